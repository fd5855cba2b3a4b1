"""JSON documents of known fields, read without trust: the types of fields, and the classes that documents are made of.

An unknown or missing field, a wrong type or a duplicate key is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic_core import PydanticCustomError

from fedqsn_cli import validate
from fedqsn_cli.errors import FormatError, InputError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern=r"^(blake3:)?[0-9a-f]{64}$")]  # see `digests`
Count = Annotated[int, Field(ge=0, le=2**53)]
PositiveNumber = Annotated[float, Field(gt=0)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]

Value = TypeVar("Value")


def _checked_by(check: Callable[[Value, str], Value]) -> AfterValidator:
    """Values of a field are checked as those of an option are."""

    def validator(value: Value) -> Value:
        try:
            return check(value, "")
        except InputError as error:
            raise problem(error.what) from None

    return AfterValidator(validator)


def problem(what: str) -> PydanticCustomError:
    """What a validator of fields raises: the text is the whole message."""
    return PydanticCustomError("fedqsn", "{what}", {"what": what})


Ratio = Annotated[float, _checked_by(validate.ratio)]
ServerRatio = Annotated[float, _checked_by(validate.up_to_one)]  # p1: 1 hides all of a model


def _printable(value: str) -> str:
    """Text that cannot steer a terminal."""
    if not value.isprintable():
        raise problem("holds a character that cannot be printed")
    return value


ShortText = Annotated[str, Field(max_length=200), AfterValidator(_printable)]
BlockSize = Annotated[int, _checked_by(validate.block_size)]


class Strict(BaseModel):
    """A JSON object of known fields: no unknown fields, no silent conversions, no infinities.

    A field with the default None is written only where it has a value. Every other field must be written.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def from_document(cls, document: object, where: object) -> Self:
        """Validate a parsed JSON document. Raises FormatError."""
        try:
            part = cls.model_validate(document)
        except ValidationError as error:
            raise FormatError(_first_problem(error), where=where) from None
        for name, field in cls.model_fields.items():
            if name not in part.model_fields_set and field.default is not None:
                raise FormatError(f"field {name}: missing", where=where)
        return part

    @model_serializer(mode="wrap")
    def _to_document(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        values: dict[str, Any] = handler(self)
        return {name: x for name, x in values.items() if x is not None or fields[name].default is not None}


class Manifest(Strict):
    """The document in a file of its own.

    Args:
        FILE: the file's name. NAME: what a folder with it is. HINT: how it comes to be there.
        LARGEST: bytes that it may have; that of a 70-billion-parameter model needs less than one MiB.
    """

    FILE: ClassVar[str]
    NAME: ClassVar[str]
    HINT: ClassVar[str]
    LARGEST: ClassVar[int] = 64 << 20


def _first_problem(error: ValidationError) -> str:
    """The first problem that a validation found, as one clause."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "document"
    message = "must be an object" if first["type"] == "model_type" else first["msg"]
    return f"field {field}: {message[:1].lower()}{message[1:]}"  # a pattern in it keeps its case
