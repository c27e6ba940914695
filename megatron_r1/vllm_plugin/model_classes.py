"""Corrects classes of vLLM's models in the processes that load them."""

import sys
from collections.abc import Callable
from typing import Any


def when_loaded(module: str, patch: Callable[[Any], None]) -> None:
    """Call `patch` with vLLM's `module` whenever a model class has been loaded and the module is
    imported; a patch that was made already has to be left alone.

    Importing the module here would cost every process of a server that runs no model some
    seconds."""
    from vllm.model_executor.models import registry

    upstream = registry._LazyRegisteredModel.load_model_cls

    def load_model_cls(self: Any) -> Any:
        model = upstream(self)
        if module in sys.modules:
            patch(sys.modules[module])
        return model

    registry._LazyRegisteredModel.load_model_cls = load_model_cls
