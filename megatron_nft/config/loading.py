"""From YAML, presets and key=value overrides to a Config.

An unknown key, a missing value or a value of the wrong type is a UserError that names the key.
"""

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_nft.config import objective
from megatron_nft.config.checks import check
from megatron_nft.config.sampling import choose_sets
from megatron_nft.config.settings import Config, DatasetConfig, EvaluationSetConfig, value_of
from megatron_nft.errors import UserError

PRESETS = Path(__file__).parent / "presets"


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file and key=value overrides (dotted keys) into a Config, and check it.

    Settings go over one another in this order: defaults, the presets that the file names, the file, a preset given as an override
    (in place of the file's), the overrides. Raises UserError for a missing file, an unknown key or preset (with the nearest known
    one), a wrong type or a bad value.
    """
    return load_with_sources(path, overrides)[0]


def load_with_sources(path: str | Path, overrides: list[str] = ()) -> tuple[Config, dict[str, str]]:
    """`load`, and where each setting that is not a default comes from, by its dotted key: "preset nft-7b", a path, "command line"."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no config file at {path}", "give the path of a YAML file, e.g. examples/arithmetic/nft.yaml")
    try:
        layers = _Layers()
        given = [leaf for override in overrides for leaf in _split(override)]
        presets = next((value for key, value in reversed(given) if key == "preset"), None)
        file = _read(path)
        layers.put(file, str(path), presets=presets is None, folder=path.parent)
        layers.put(OmegaConf.create({"preset": presets}), "command line")
        given = [(key, value) for key, value in given if key != "preset"]
        for key, value in sorted(given, key=lambda item: item[0] != "objective.name"):  # the name first: it sets the others anew
            layers.set(key, value)
        if (layers.tree.objective.name, layers.tree.objective.neg_weight) == ("nft", objective.AUTHORS_DAPO):
            layers.set("objective.name", "dapo", "objective.neg_weight -1: the NFT authors' spelling")
            for key, value in given:
                if key.startswith("objective.") and key not in ("objective.name", "objective.neg_weight"):
                    layers.set(key, value)
        config = OmegaConf.to_object(layers.tree)
    except OmegaConfBaseException as error:
        raise _explain(error, path) from None
    except TypeError as error:  # OmegaConf's for a list where a mapping belongs, or the other way round
        raise UserError(f"{path} or an override puts a list where a mapping belongs, or the other way round ({error})",
                        "compare with megatron_nft/config/settings.py") from None  # fmt: skip
    choose_sets(config.evaluation)
    check(config)
    return config, layers.sources


class _Layers:
    """The tree of settings as layer after layer goes over it, and who set what last."""

    def __init__(self):
        self.tree: DictConfig = OmegaConf.structured(Config)
        objective.forget(self.tree.objective)  # what no layer sets is filled in at the end
        self.sources: dict[str, str] = {}

    def put(self, layer: DictConfig, source: str, presets: bool = True, folder: Path = Path()) -> None:
        """Put a file's settings over what is there, and below them the presets it names (unless `presets` is false).

        folder: where presets that are files lie. Only published ones stay under `preset`: a file may be elsewhere when a saved config,
        which has all its settings, is read again.
        """
        names = _preset_names_in(layer.pop("preset", None))
        if presets and names:
            for name in names:
                path = _preset_path(name, folder)
                self.put(_read(path), f"preset {name}", folder=path.parent)
            if published := [name for name in names if not _is_file(name)]:
                self.tree.preset, self.sources["preset"] = published, source
        _check_sections(layer, source)
        self._start_anew(OmegaConf.select(layer, "objective.name"))
        self.tree = OmegaConf.merge(self.tree, layer)
        self.sources |= dict.fromkeys(_leaves(layer), source)

    def set(self, key: str, value: object, source: str = "command line") -> None:
        """One override. It reaches into lists, too: evaluation.sets.0.path."""
        if key == "objective.name":
            self._start_anew(value)
        OmegaConf.update(self.tree, key, value)
        self.sources[key] = source

    def _start_anew(self, name: object) -> None:
        """Another objective takes none of the last one's settings."""
        if name is not None and name != self.tree.objective.name:
            objective.forget(self.tree.objective)
            for key in objective.OWN_SETTINGS:
                self.sources.pop(f"objective.{key}", None)


def preset_names() -> list[str]:
    """The published runs that can be named as `preset`."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _preset_names_in(value: object) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if names is not None and not (isinstance(names, list | ListConfig) and all(isinstance(name, str) for name in names)):
        raise UserError(f"preset is {value!r}", f"name one or more of {', '.join(preset_names())}")
    return list(names or [])


def _is_file(name: str) -> bool:
    """Whether a preset is a file of the user's own."""
    return name.endswith(".yaml")


def _preset_path(name: str, folder: Path) -> Path:
    if _is_file(name):
        if not (folder / name).is_file():
            raise UserError(f"no preset at {folder / name}", "mend the path: it is relative to the file that names it")
        return folder / name
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        raise UserError(f"there is no preset {name!r}", f"did you mean {near[0]}?" if near else f"use one of {', '.join(names)}")
    return PRESETS / f"{name}.yaml"


def _leaves(tree: DictConfig, prefix: str = "") -> list[str]:
    """Dotted keys of all values; a list is one value."""
    keys = []
    for key, value in tree.items_ex(resolve=False):
        keys += _leaves(value, f"{prefix}{key}.") if isinstance(value, DictConfig) else [f"{prefix}{key}"]
    return keys


def _check_sections(layer: DictConfig, source: str, prefix: str = "") -> None:
    """Raise UserError where a value stands for a whole section."""
    for key, value in layer.items_ex(resolve=False):
        inner = _within(f"{prefix}{key}")
        if isinstance(value, DictConfig):
            _check_sections(value, source, f"{prefix}{key}.")
        elif inner:
            raise _section_error(f"{prefix}{key}", value, source, inner)


def _within(section: str) -> list[str]:
    """The dotted names of a section's settings; none for a setting."""
    return [key for key in known_keys() if key.startswith(f"{section}.")]


def _section_error(key: str, value: object, source: str, inner: list[str]) -> UserError:
    return UserError(f"{key}: {value!r} where a section belongs ({source})", f"set {inner[0]}, or another of its settings")


def _split(override: str) -> list[tuple[str, object]]:
    """The settings of one override; a mapping for a whole section (objective={name: dapo}) is several."""
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"cannot read the override {override!r}", "write it as key=value, e.g. train.steps=10")
    return list(_settings_of(key, _parse(value, override)))


def _settings_of(key: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and _within(key):
        for name, inner in value.items():
            yield from _settings_of(f"{key}.{name}", inner)
    elif inner := _within(key):
        raise _section_error(key, value, "command line", inner)
    else:
        yield key, value


def _read(path: Path) -> DictConfig:
    try:
        tree = OmegaConf.load(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} of {path}" if mark else str(path)
        raise UserError(f"{where} is not YAML ({getattr(error, 'problem', None) or error})", "mend the YAML") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text file", "give a YAML file in UTF-8") from None
    except OSError:  # OmegaConf's answer to a file that holds one number or word
        tree = None
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path} holds no settings", "write one `key: value` a line, as in examples/arithmetic/nft.yaml")
    return tree


def _parse(value: str, override: str) -> object:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(
            f"cannot read the override {override!r} ({problem})", "write the value as in YAML, in quotes where it needs them"
        ) from None


def save(config: Config, path: str | Path) -> None:
    """Write the resolved config as YAML."""
    OmegaConf.save(OmegaConf.structured(config), path)


def describe(config: Config, sources: dict[str, str]) -> str:
    """A table of the settings that are no defaults: value, and where it comes from (from `load_with_sources`)."""
    own = [*objective.PUBLISHED[config.objective.name], *(["reduction_constant"] if config.objective.reduction == "constant" else [])]
    published = {f"objective.{key}": f"{config.objective.name} as published" for key in own}
    rows = {
        key: (_on_one_line(value), source) for key, source in (published | sources).items() if (value := value_of(config, key)) is not None
    }
    widths = max(map(len, rows), default=0), min(max((len(value) for value, _ in rows.values()), default=0), 40)
    lines = [f"{key:<{widths[0]}}  {value:<{widths[1]}}  {source}" for key, (value, source) in sorted(rows.items())]
    return "\n".join([*lines, "everything else is a default of megatron_nft/config/settings.py"])


def _on_one_line(value: object) -> str:
    """A value as YAML would have it."""
    plain = [_plain(item) for item in value] if isinstance(value, list) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _plain(item: object) -> object:
    """A data set as a mapping of what it sets."""
    if not dataclasses.is_dataclass(item):
        return item
    default = type(item)()
    return {f.name: getattr(item, f.name) for f in dataclasses.fields(item) if getattr(item, f.name) != getattr(default, f.name)}


def _explain(error: OmegaConfBaseException, path: Path) -> UserError:
    """OmegaConf's error as one line with the key and the mend."""
    key = getattr(error, "full_key", None) or getattr(error, "key", None) or "?"
    message = str(error).splitlines()[0]
    if "not in" in message and "Key" in message:
        known = list(known_keys())
        leaf = str(key).rsplit(".", 1)[-1]
        kind = getattr(error, "object_type", None)
        if kind in (DatasetConfig, EvaluationSetConfig):  # within a list of data sets
            known = [str(key).removesuffix(leaf) + f.name for f in dataclasses.fields(kind)]
        near = difflib.get_close_matches(str(key), known, 1) or [k for k in known if k.rsplit(".", 1)[-1] == leaf]
        return UserError(f"unknown setting {key} (in {path} or on the command line)",
                         f"did you mean {near[0]}?" if near else "see megatron_nft/config/settings.py for all settings")  # fmt: skip
    if "MISSING" in message or "mandatory" in message.lower():
        return UserError(f"{key} has no value in {path}", f"add it, or pass {key}=...")
    return UserError(f"{key}: {message} (in {path} or on the command line)", "mend the value")


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """The dotted names of all settings."""
    keys = []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            keys += known_keys(f.type, f"{prefix}{f.name}.")
        else:
            keys.append(prefix + f.name)
    return keys
