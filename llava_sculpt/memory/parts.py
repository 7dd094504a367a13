"""Bytes that a training step needs on one GPU, part by part, from sizes alone.

Nothing is loaded. The formulas count what PyTorch, PEFT, bitsandbytes and DeepSpeed keep. Tests hold each of them
against the storages of real and of traced models.

Letters: N tokens in a micro-batch (padding counts), H hidden size, F intermediate size, V vocabulary, r rank,
a W of (p, q) = (out, in) features, e bytes of an activation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import LlavaConfig

MIB = 2**20
TABLE_BYTES = 4 * 32768  # of M for one 16-bit matrix: one float32 for every magnitude
TILE_ROWS = 1024  # rows of W that CMR works on at a time on a GPU without its fused kernels
# Those leave partial sums for every so many rows and columns of W, of as many matrices at once as fit GROUP_BYTES.
TILE, TILE_ALONE, GROUP_BYTES = (512, 1024), (128, 512), 160 * MIB

# What no tensor accounts for: what these usually take on a 24 GB card, not measured. One H200 took 2.76 GiB in all.
CONTEXT_BYTES = 500 * MIB  # CUDA context and loaded kernels
LIBRARY_BYTES = 400 * MIB  # workspaces of cuBLAS and cuDNN, NCCL's channels
FRAGMENTATION_BYTES = 600 * MIB  # held by the caching allocator without being in use
OUTSIDE_BYTES = CONTEXT_BYTES + LIBRARY_BYTES + FRAGMENTATION_BYTES

Shape = tuple[int, int]


@dataclass(frozen=True)
class Architecture:
    """The sizes of a LLaVA-1.5 model that decide memory and arithmetic.

    Attributes:
        attention_width: heads times head size. key_value_width: the same for keys and values.
        image_tokens: tokens one image becomes. feature_width: what the connector takes per image token.
    """

    hidden: int
    layers: int
    heads: int
    attention_width: int
    key_value_width: int
    intermediate: int
    vocabulary: int
    tied_head: bool
    tower_hidden: int
    tower_layers: int
    tower_intermediate: int
    image_tokens: int
    patch_values: int
    feature_width: int

    @classmethod
    def from_config(cls, checkpoint_config: dict[str, Any]) -> Architecture:
        """Read a LLaVA checkpoint's config.json; fields it leaves out have the architecture's defaults."""
        config = LlavaConfig.from_dict(checkpoint_config)
        text: Any = config.text_config
        vision: Any = config.vision_config
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        feature_layers: Any = config.vision_feature_layer
        return cls(
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            attention_width=text.num_attention_heads * head_size,
            key_value_width=text.num_key_value_heads * head_size,
            intermediate=text.intermediate_size,
            vocabulary=text.vocab_size,
            tied_head=bool(config.tie_word_embeddings),
            tower_hidden=vision.hidden_size,
            tower_layers=vision.num_hidden_layers,
            tower_intermediate=vision.intermediate_size,
            image_tokens=(vision.image_size // vision.patch_size) ** 2,
            patch_values=vision.num_channels * vision.patch_size**2,
            feature_width=vision.hidden_size * (1 if isinstance(feature_layers, int) else len(feature_layers)),
        )

    @property
    def regularized_matrices(self) -> list[Shape]:
        """(p, q) of W_Q, W_K, W_V of one decoder layer."""
        return [(self.attention_width, self.hidden), *[(self.key_value_width, self.hidden)] * 2]

    @property
    def layer_matrices(self) -> list[Shape]:
        """(p, q) of the seven linear layers of one decoder layer."""
        H, F = self.hidden, self.intermediate
        return [*self.regularized_matrices, (H, self.attention_width), (F, H), (F, H), (H, F)]

    @property
    def connector_matrices(self) -> list[Shape]:
        return [(self.hidden, self.feature_width), (self.hidden, self.hidden)]

    @property
    def layer_parameters(self) -> int:
        return _entries(self.layer_matrices) + 2 * self.hidden

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def connector_parameters(self) -> int:
        return _entries(self.connector_matrices) + 2 * self.hidden

    @property
    def tower_layer_parameters(self) -> int:
        H, F = self.tower_hidden, self.tower_intermediate
        return 4 * (H * H + H) + 2 * H * F + F + H + 4 * H

    @property
    def tower_parameters(self) -> int:
        H = self.tower_hidden
        embeddings = H * (1 + self.patch_values + self.image_tokens + 1)
        return embeddings + 4 * H + self.tower_layers * self.tower_layer_parameters

    @property
    def parameters(self) -> int:
        heads = 1 if self.tied_head else 2
        language_model = self.layers * self.layer_parameters + heads * self.head_parameters + self.hidden
        return language_model + self.connector_parameters + self.tower_parameters


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed configuration decides memory. Sizes in elements.

    Attributes:
        stage: 1 (optimizer states are split over the GPUs), 2 (gradients too) or 3 (weights too).
        overlap: gradients are collected in a second bucket while the first is sent.
        offload_weights, offload_optimizer: kept in the host's memory; the latter takes the gradients along.
    """

    stage: int
    reduce_bucket: int = 500_000_000
    overlap: bool = False
    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000
    offload_weights: bool = False
    offload_optimizer: bool = False


@dataclass(frozen=True)
class Setup:
    """All that decides the memory of one GPU.

    Attributes:
        half: 16-bit training (bf16 or fp16); else float32.
        bits: of the frozen linear layers of the LLM.
        regularized: CMR on Q, K, V of the LLM. connector_regularized: on the connector. masked: the LLM is pruned.
        zero: DeepSpeed, or None for plain PyTorch (DDP on several GPUs).
        batch: samples in a micro-batch. length: tokens per sample with its image.
        checkpointing: activations are kept of all decoder layers but every n-th; 0: of all, 1 (True): of none.
        unlabelled: positions per sample without a label, for which no logits are made: its image's.
    """

    architecture: Architecture
    half: bool
    bits: int
    double_quant: bool
    lora_r: int
    lora_dropout: float
    connector: str
    regularized: bool
    connector_regularized: bool
    masked: bool
    zero: Zero | None
    gpus: int
    batch: int
    accumulation: int
    length: int
    checkpointing: int
    unlabelled: int = 0

    @property
    def logits(self) -> int:
        """Positions of a micro-batch that get logits."""
        return self.batch * max(self.length - self.unlabelled, 1)

    @property
    def checkpointed(self) -> list[bool]:
        """Of each decoder layer, whether it is computed again in backward.

        Transformers counts the layers of the whole model, the vision tower's before the language model's.
        """
        before, n = self.architecture.tower_layers, self.checkpointing
        return [n > 0 and (before + layer) % n == 0 for layer in range(self.architecture.layers)]

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def width(self) -> int:
        """Bytes of an activation and of a frozen 16-bit (or float32) weight."""
        return 2 if self.half else 4

    @property
    def autocast(self) -> bool:
        """Without DeepSpeed LoRA stays float32 and autocast makes the 16-bit copies; DeepSpeed casts the model."""
        return self.half and self.zero is None

    @property
    def stage(self) -> int:
        return 0 if self.zero is None else self.zero.stage

    @property
    def llm_lora(self) -> int:
        """Entries of A and B of the language model: r (p + q) per matrix."""
        return self.architecture.layers * _lora_entries(self.architecture.layer_matrices, self.lora_r)

    @property
    def trainable(self) -> int:
        """Entries that train: LoRA, and the connector's own weights or LoRA on them."""
        if self.connector == "full":
            return self.llm_lora + self.architecture.connector_parameters
        if self.connector == "frozen":
            return self.llm_lora
        return self.llm_lora + _lora_entries(self.architecture.connector_matrices, self.lora_r)

    @property
    def frozen(self) -> int:
        """Entries of the base model that do not train."""
        sizes = self.architecture
        return sizes.parameters - (sizes.connector_parameters if self.connector == "full" else 0)


def memory_parts(setup: Setup) -> dict[str, int]:
    """Bytes per GPU at the worst moment of a step, by part. Their sum is the estimate."""
    saved = saved_activations(setup)
    return {
        "base weights": base_weights(setup),
        "gathered weights (ZeRO-3)": gathered_weights(setup),
        "trained weights": trained_weights(setup),
        "gradients": gradients(setup),
        "optimizer": optimizer_states(setup),
        "masks": setup.llm_lora if setup.masked else 0,  # one bool per entry of A and B
        "regularizer (CMR)": regularizer(setup),
        "saved activations": saved,
        "working memory": max(activation_peaks(setup).values()) - saved,
        "CUDA, libraries, fragmentation": OUTSIDE_BYTES,
    }


def base_weights(setup: Setup) -> int:
    """The frozen weights one GPU holds."""
    # Only the LLM's linear layers are quantised; embeddings, head, norms, tower and connector are not.
    linear = _entries(setup.architecture.layer_matrices) * setup.architecture.layers
    total = (setup.frozen - linear) * setup.width + setup.architecture.layers * sum(
        matrix_bytes(setup, shape) for shape in setup.architecture.layer_matrices
    )
    if setup.zero is None or setup.zero.stage < 3:
        return total
    return 0 if setup.zero.offload_weights else _share(total, setup.gpus)


def matrix_bytes(setup: Setup, shape: Shape) -> int:
    """One frozen linear layer as it is stored."""
    rows, columns = shape
    entries = rows * columns
    if setup.bits == 16:
        return entries * setup.width
    if setup.bits == 8:
        return entries + 4 * rows  # int8, and a float32 scale per row
    blocks = -(-entries // 64)
    tables = 4 * 16  # the 16 levels, as float32
    if setup.double_quant:  # one byte per block of 64, a float32 per 256 blocks, and the levels of those bytes
        return entries // 2 + blocks + 4 * -(-blocks // 256) + 4 * 256 + tables
    return entries // 2 + 4 * blocks + tables


def gathered_weights(setup: Setup) -> int:
    """ZeRO-3: whole weights at hand around the module that computes."""
    if setup.zero is None or setup.zero.stage != 3:
        return 0
    sizes = setup.architecture
    layer = sum(matrix_bytes(setup, shape) for shape in sizes.layer_matrices)
    # A layer stays from its recomputation to its backward while the next is fetched; at the turn of forward and
    # backward the head stands beside the last layer.
    pair = layer + max(layer, sizes.head_parameters * setup.width)
    return min(pair + setup.zero.prefetch_bucket * setup.width, setup.frozen * setup.width)


def trained_weights(setup: Setup) -> int:
    """LoRA and the trained connector, as the forward pass reads them."""
    if setup.zero is not None and setup.zero.stage == 3:
        # Matrices up to the threshold are never released; larger ones come and go with their layer.
        sides = [setup.lora_r * side for pair in setup.architecture.layer_matrices for side in pair]
        whole = setup.architecture.layers * sum(n for n in sides if n <= setup.zero.persistence_threshold)
        own = 0 if setup.zero.offload_weights else _share(setup.trainable, setup.gpus)
        return (own + whole) * setup.width
    if setup.zero is not None:
        return setup.trainable * setup.width  # the engine casts what trains to the model's precision
    # Plain PyTorch keeps float32; autocast caches a 16-bit copy for the time of a step.
    return setup.trainable * (4 + (2 if setup.autocast else 0))


def gradients(setup: Setup) -> int:
    """Gradients between backward and optimizer, and the buffers they travel in."""
    zero = setup.zero
    if zero is None:
        # DDP sends buckets that are a second copy of all gradients.
        return setup.trainable * 4 * (2 if setup.gpus > 1 else 1)
    # Buckets are allocated whole, however little trains: one with ZeRO-3, a second with overlap before it.
    buckets = 1 if zero.stage == 3 else 2 if zero.overlap else 1
    own = _share(setup.trainable, setup.gpus) if zero.stage >= 2 else setup.trainable
    own = 0 if zero.offload_optimizer else own
    return (own + buckets * zero.reduce_bucket) * setup.width


def optimizer_states(setup: Setup) -> int:
    """Adam: two float32 moments; DeepSpeed adds a float32 master copy and splits all three over the GPUs."""
    if setup.zero is None:
        return 8 * setup.trainable
    if setup.zero.offload_optimizer:
        return 0
    return 12 * _share(setup.trainable, setup.gpus)


def regularizer(setup: Setup) -> int:
    """CMR: what is kept per matrix for good, and the most that is made and dropped again: for a group of matrices with
    16-bit W their gradients and partial sums; else A, B and gradients of one matrix, and one tile's scratch."""
    sizes = setup.architecture
    matrices = sizes.regularized_matrices * sizes.layers if setup.regularized else []
    if setup.connector_regularized:
        matrices = matrices + sizes.connector_matrices
    if not matrices:
        return 0
    tables = len(matrices) * TABLE_BYTES if setup.half else 0
    if setup.stage == 3:
        # Every process works on its pieces of all matrices, with their A and B gathered, and autograd holds their
        # float32 gradients until backward.
        gradients = (4 + setup.width) * _lora_entries(matrices, setup.lora_r)
    else:  # every N-th matrix, in backward
        tables = _share(tables, setup.gpus)
        if setup.half and setup.bits == 16:
            return tables + max(_cmr_group(setup, shape, matrices.count(shape)) for shape in set(matrices))
        gradients = max(2 * 4 * _lora_entries([matrix], setup.lora_r) for matrix in matrices)  # A and B, in float32
    # Per tile three of these live at once: int32 codes twice, M, B A; all with 4 bytes an entry.
    tile = max(3 * 4 * min(TILE_ROWS, rows) * columns for rows, columns in matrices)
    # bitsandbytes dequantises 8 bits to float32, 4 bits to the model's precision.
    entry = {16: 0, 8: 4, 4: setup.width}[setup.bits]
    whole = entry * max(rows * columns for rows, columns in matrices)
    # Dequantised from 4 bits, a matrix is 16-bit again, and a group of one.
    alone = max(_cmr_group(setup, shape, 1) for shape in matrices) if setup.half and setup.bits == 4 else 0
    return tables + max(gradients + tile, alone) + whole


def _cmr_group(setup: Setup, shape: Shape, count: int) -> int:
    """`count` matrices of one shape, shared out over the processes and worked on in equal portions."""
    rows, columns = shape

    def each(tile: Shape) -> int:
        parts = 4 * (-(-rows // tile[0]) * columns + -(-columns // tile[1]) * rows)
        return setup.lora_r * (parts + (4 if setup.autocast else setup.width) * (rows + columns))

    portions = -(-count // (setup.gpus * max(1, GROUP_BYTES // each(TILE))))
    at_once = -(-count // (portions * setup.gpus))
    return at_once * each(TILE if at_once > 1 else TILE_ALONE)


def saved_activations(setup: Setup) -> int:
    """What forward leaves for backward, without what belongs to the loss."""
    sizes, e = setup.architecture, setup.width
    mask = setup.length**2 * setup.batch if setup.batch > 1 else 0  # bool, made once when there is padding
    again = sum(setup.checkpointed)  # of these only the input
    layers = again * setup.tokens * sizes.hidden * e + (sizes.layers - again) * layer_saved(setup)
    return layers + _connector_saved(setup) + mask


def layer_saved(setup: Setup) -> int:
    """What one decoder layer saves for its backward. Frozen linear layers save nothing but their weight."""
    sizes, e, N = setup.architecture, setup.width, setup.tokens
    norms = 2 * 4 * N * sizes.hidden  # the norms compute in float32 and save their input so
    # Queries, keys, values and output; with a padding mask shared heads are repeated to full width. 4: logsumexp.
    attention = 4 * e * N * sizes.attention_width + 4 * N * sizes.heads
    if setup.batch > 1:  # the padding mask as the kernel wants it: added to the scores
        attention += e * setup.batch * setup.length**2
    mlp = 3 * e * N * sizes.intermediate  # gate, silu(gate), up
    rank = len(sizes.layer_matrices) * e * N * setup.lora_r  # A x, the input of B
    return norms + attention + mlp + rank + _lora_inputs(setup)


def loss_saved(setup: Setup) -> int:
    """What the last norm, the choice of positions and the loss leave for backward, which begins with them."""
    sizes = setup.architecture
    norm = (4 + setup.width) * setup.tokens * sizes.hidden  # its float32 input, and its output
    # An int64 for every entry of a hidden state that goes to the head, and the log-probabilities.
    return norm + setup.logits * (8 * sizes.hidden + 4 * sizes.vocabulary)


def activation_peaks(setup: Setup) -> dict[str, int]:
    """Activations alive at the moments that can be the peak of a step, in bytes, saved ones included."""
    sizes, e = setup.architecture, setup.width
    saved = saved_activations(setup)
    # Backward of the loss: beside the log-probabilities their gradient and the logits', all float32; the 16-bit
    # logits are gone by then.
    loss = saved + loss_saved(setup) + 8 * setup.logits * sizes.vocabulary
    # Backward frees layer by layer: the worst of the last layer and the last that is computed again.
    behind = [*reversed(setup.checkpointed), True].index(True)
    layer = saved + _layer_peak(setup, again=behind == 0) + (layer_saved(setup) if behind == 0 else 0)
    if 0 < behind < sizes.layers:
        layer = max(layer, saved + (1 - behind) * layer_saved(setup) + _layer_peak(setup, again=True))
    images = setup.batch * (sizes.image_tokens + 1) * e
    # Every hidden state of the tower is held until the language model has run; one MLP's two halves beside them.
    tower = images * ((sizes.tower_layers + 3) * sizes.tower_hidden + 2 * sizes.tower_intermediate)
    return {"loss": loss, "one layer's backward": layer, "vision tower": max(saved, tower)}


def _layer_peak(setup: Setup, *, again: bool) -> int:
    """Beyond what a layer saves: the most that its recomputation or its backward holds at once."""
    sizes, e, N = setup.architecture, setup.width, setup.tokens
    H, F = sizes.hidden, sizes.intermediate
    if setup.autocast:
        # PEFT casts the input of down_proj to float32 for A, dropout makes another, and both stand beside the
        # 16-bit product; three hidden states as below.
        forward = N * F * (2 + 4 + (4 if setup.lora_dropout else 0)) + 3 * e * N * H
        backward = N * F * (2 + 4 + 4) + e * N * H
    elif _own_inputs(setup):
        # The product that enters down_proj, its output, both norms' outputs, the residual, the layer's gradient.
        forward = e * N * (F + 5 * H)
        # Two gradients of the product and their sum; the copy that A took, and its mask, are gone by then.
        backward = e * N * (2 * F + H) - N * F
    else:
        forward = 3 * e * N * H
        backward = e * N * (2 * F + H)
    shared = 0
    if not setup.half:
        # In float32 the norms save the residual stream itself: the middle one, and the checkpointed layer input.
        shared = (2 if again else 1) * e * N * H
    dequantised = e * max(p * q for p, q in sizes.layer_matrices) if setup.bits < 16 else 0
    return max(forward, backward) - shared + dequantised


def _own_inputs(setup: Setup) -> bool:
    """Whether each A saves an input of its own: dropout and autocast's casts make one per module."""
    return setup.lora_dropout > 0 or setup.autocast


def _lora_inputs(setup: Setup) -> int:
    sizes, e, N = setup.architecture, setup.width, setup.tokens
    if not _own_inputs(setup):
        # Both norms' outputs, shared, and the product; the input of o_proj is the attention's output.
        return e * N * (2 * sizes.hidden + sizes.intermediate)
    columns = sum(q for _, q in sizes.layer_matrices)
    return N * columns * (e + (1 if setup.lora_dropout else 0))  # dropout's mask: a byte per entry


def _connector_saved(setup: Setup) -> int:
    """Inputs of both linear layers and of the GELU between them."""
    if setup.connector == "frozen":
        return 0
    sizes = setup.architecture
    return setup.batch * sizes.image_tokens * (sizes.feature_width + 2 * sizes.hidden) * setup.width


def step_flops(setup: Setup) -> int:
    """Floating-point operations of one optimizer step on all GPUs together, a multiply-add counted as two.

    Per token, with D the entries of the frozen matrices, R those of LoRA and S the length:

        forward      2 (D + R)        and 4 S per layer and attention width (scores, values; the causal half too)
        recompute    the same for the checkpointed decoder layers
        backward     2 D for the activations, none for frozen weights, 4 R for LoRA; attention 10 S (its five
                     products, for the kernels recompute the scores)

    The head is not recomputed, and counts at the positions that have a label: 4 H V each. The tower only runs forward.
    CMR adds 6 r p q per regularized matrix once per step.
    """
    sizes, S = setup.architecture, setup.length
    layers, head = sizes.layers * _entries(sizes.layer_matrices), sizes.head_parameters
    attention = sizes.layers * S * sizes.attention_width
    forward = 2 * (layers + setup.llm_lora) + 4 * attention
    backward = 2 * layers + 4 * setup.llm_lora + 10 * attention
    if setup.connector == "frozen":
        # Nothing before the first layer wants a gradient, so none flows out of its Q, K and V.
        backward -= 2 * _entries(sizes.regularized_matrices) + 2 * setup.lora_r * 3 * sizes.hidden
    per_token = forward + forward * sum(setup.checkpointed) // sizes.layers + backward

    places = sizes.image_tokens + 1
    width = sizes.tower_hidden
    tower_linear = 2 * sizes.tower_layers * (4 * width**2 + 2 * width * sizes.tower_intermediate)
    tower_attention = sizes.tower_layers * places * width
    tower = places * (tower_linear + 4 * tower_attention)
    connector_passes = 6 if setup.connector == "full" else 4
    connector = sizes.image_tokens * connector_passes * _entries(sizes.connector_matrices)

    micro_steps = setup.accumulation * setup.gpus
    regularized = sizes.regularized_matrices * sizes.layers if setup.regularized else []
    cmr = 6 * setup.lora_r * _entries(regularized)
    per_micro_step = setup.tokens * per_token + 4 * head * setup.logits + setup.batch * (tower + connector)
    return micro_steps * per_micro_step + cmr


def _entries(matrices: Iterable[Shape]) -> int:
    return sum(rows * columns for rows, columns in matrices)


def _lora_entries(matrices: Iterable[Shape], r: int) -> int:
    return sum(r * (rows + columns) for rows, columns in matrices)


def _share(entries: int, gpus: int) -> int:
    return -(-entries // gpus)
