from tests.train.conftest import flags, train

__all__ = ["flags", "train"]
