"""What every configuration section shares: strict keys, immutability, documented fields."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the configuration tree.

    Unknown keys are refused, values are checked against the declared types and ranges, and the
    docstring under each field is its documentation (`hope config` prints it).
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
