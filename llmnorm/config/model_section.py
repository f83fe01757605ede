"""The run file's section `model`: what is built, or the finished model that a run starts from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

from llmnorm.config import choices
from llmnorm.config.fields import LocalPath, Section
from llmnorm.config.start import agrees, model_folder, read_start


class NormChoice(Section):
    """A norm by name, with the options its class takes (`llmnorm list norms` shows them)."""

    model_config = ConfigDict(extra="allow")

    op: str = Field("rmsnorm", description="norm (see `llmnorm list norms`); options beside it")

    @field_validator("op")
    @classmethod
    def _known(cls, value: str) -> str:
        return choices.check_norm(value)


class PlacementChoice(Section):
    """A placement by name, with the options its class takes (`llmnorm list placements`)."""

    model_config = ConfigDict(extra="allow")

    name: str = Field("pre_ln", description="placement (see `llmnorm list placements`)")

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return choices.check_placement(value)


class ModelSection(Section):
    """What is built: a shape, a norm, a placement; or the model that is continued."""

    imports: list[str] = Field(
        [], description="Python modules that register norms or placements of your own"
    )
    start: LocalPath | None = Field(
        None,
        description="begin with this finished model, a run or a Hugging Face folder: it gives "
        "shape, norm, placement and weights",
    )
    preset: str | None = Field(
        None, description="shape: a preset's name or a folder with config.json; this or model.start"
    )
    norm: NormChoice = Field(NormChoice.model_construct(), description="norm and its options")
    placement: PlacementChoice = Field(
        PlacementChoice.model_construct(), description="placement and its options"
    )
    overrides: dict[str, Any] = Field(
        {}, description="model config fields that replace the preset's, e.g. embedding: scale"
    )

    @field_validator("imports")
    @classmethod
    def _registers(cls, value: list[str]) -> list[str]:
        for module in value:
            choices.import_module(module)
        return value

    @field_validator("start")
    @classmethod
    def _start_exists(cls, value: Path | None) -> Path | None:
        if value is not None:
            read_start(value)
        return value

    @field_validator("preset", "norm", "placement", mode="before")
    @classmethod
    def _of_the_start(cls, value: Any, info: ValidationInfo) -> Any:
        """With `start` these keys are its; what else they were given as is a mistake."""
        if info.data.get("start") is None:
            return value
        start, key = read_start(info.data["start"]), info.field_name or ""
        if key == "preset":
            has: Any = str(start.folder)
            same = value in (None, has)
        else:
            has = getattr(start, key)
            same = isinstance(value, Section) or (isinstance(value, Mapping) and agrees(value, has))
        if not same:
            raise ValueError(f"model.start gives it ({has}); leave one of the two out")
        chosen: dict[str, type[Section]] = {"norm": NormChoice, "placement": PlacementChoice}
        return chosen[key].model_construct(**has) if key in chosen else has

    @field_validator("preset")
    @classmethod
    def _preset_exists(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and "start" in info.data:  # not there when it has an error of its own
            raise PydanticKnownError("missing")
        return None if value is None else choices.check_preset(value)

    @field_validator("norm", "placement", "overrides")
    @classmethod
    def _builds(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("start") is None:
            choices.check_build(info.field_name or "", value, info.data)
        elif info.field_name == "overrides" and value:
            raise ValueError("model.start is taken as it is; drop overrides")
        return value

    @property
    def start_folder(self) -> Path | None:
        """The Hugging Face folder that `start` means."""
        return None if self.start is None else model_folder(self.start)

    def build_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `llmnorm.build_config` that this section stands for."""
        assert self.preset is not None
        return choices.build_arguments(self.preset, self.norm, self.placement, self.overrides)
