"""Settings that every served reward has, read from `rewards.options` or from the line itself."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator


class ServiceSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    url: str = Field(
        description="of the service: http://host:port, or the base URL its manual gives"
    )
    model: str = Field(min_length=1, description="the name it is served under")
    api_key_env: str | None = Field(
        None, description="environment variable that holds the key; null: none is sent"
    )
    timeout_seconds: float = Field(120.0, gt=0, description="for one try")
    retry_seconds: float = Field(
        300.0, ge=0, description="how long a service may be away before the run stops"
    )
    concurrency: int = Field(32, ge=1, description="requests at once")
    max_chars: int = Field(
        20_000, ge=100, description="a longer response is shown without its middle"
    )

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https://, got {url!r}")
        try:
            is_complete = bool(urlsplit(url).hostname) and urlsplit(url).port != 0
        except ValueError:  # of the port
            is_complete = False
        if not is_complete:
            raise ValueError(f"url must have a host, and a port up to 65535 or none, got {url!r}")
        return url.rstrip("/")

    @property
    def api_base(self) -> str:
        """`url` as OpenAI's clients want it: with the API's version where it has no path at all."""
        return self.url if urlsplit(self.url).path else f"{self.url}/v1"


Settings = TypeVar("Settings", bound=ServiceSettings)


def read_settings(kind: str, of: type[Settings], options: Mapping[str, Any]) -> Settings:
    """`options` as settings of reward `kind`.

    Raises ValueError with one line for all mistakes, each by its name and with the nearest right
    one.
    """
    try:
        return of.model_validate(dict(options))
    except ValidationError as failure:
        mistakes = [_explain(error, of) for error in failure.errors()]
        raise ValueError(f"rewards.options of {kind}: " + "; ".join(mistakes)) from None


def _explain(error: Mapping[str, Any], of: type[ServiceSettings]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, of.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(of.model_fields)}"
        return f"unknown option {name}; {hint}"
    if error["type"] == "missing":
        return f"{name} must be set ({of.model_fields[name].description})"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{name}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
