"""The saved models of `tests/modules`, for the tests of what loads them."""

from tests.modules.conftest import model_folders

__all__ = ["model_folders"]
