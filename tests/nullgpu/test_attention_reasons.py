"""Every refusal of cuDNN's attention in the installed Transformer Engine is understood."""

import ast
import importlib.util
from pathlib import Path

from megatron_r1.models.attention_choice import why_not

FUSED = "FusedAttention"
UTILS = "pytorch/attention/dot_product_attention/utils.py"


def logged(statements):
    """Return what `logger.debug` and others are given, as far as it is written in the source."""
    calls = [
        node
        for statement in statements
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger.")
    ]
    arguments = [argument for call in calls for argument in call.args[:1]]
    return [argument.value for argument in arguments if isinstance(argument, ast.Constant)]


def places_of_refusals(function):
    """Return the messages of each block of statements in which fused attention is switched off."""
    for node in ast.walk(function):
        for field in ("body", "orelse"):
            block = getattr(node, field, None)
            if isinstance(block, list) and any(
                ast.unparse(statement) == "use_fused_attention = False" for statement in block
            ):
                yield block[0].lineno, logged(block)


def test_every_refusal_in_the_installed_source_has_a_reason_that_is_read():
    (package,) = importlib.util.find_spec("transformer_engine").submodule_search_locations
    tree = ast.parse((Path(package) / UTILS).read_text())
    (function,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "get_attention_backend"
    )
    sentences = [text for text in logged([function]) if "Disabling FusedAttention" in text]
    assert len(sentences) > 30
    assert [text for text in sentences if len(why_not(FUSED, [text])) < 4] == []
    places = dict(places_of_refusals(function))
    assert len(places) > 30
    # The last one logs nothing: before Hopper, flash-attn is preferred where both are possible.
    assert [texts for texts in places.values() if not why_not(FUSED, texts)] == [[]]
