"""HTML pages from templates, each one document without anything else to load."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_r1.reporting.formatting import make_printable


def render_page(template: str, **values: Any) -> str:
    """Return the HTML of a template, such as "reporting/templates/run.html.jinja".

    Values are escaped unless the template marks them as safe."""
    return _template_environment().get_template(template).render(values)


@cache
def _template_environment() -> Environment:
    """Return Jinja with the templates of all packages, by their path within `megatron_r1`."""
    environment = Environment(
        loader=PackageLoader("megatron_r1", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["printable"] = make_printable
    return environment
