"""The maths of the paper's baselines, each on the tensors of one layer (docs/method.md has the definitions).

`l2` and `orth` are penalties for the loss, differentiable in A and B: `train/regularizer.py` finds `NAME_penalty` by
the method's name and sums it over the layers. `tailor` is what `artifacts/model_tailor.py` does to a layer.
"""
