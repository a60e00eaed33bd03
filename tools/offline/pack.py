"""What a machine without a network lacks to run this project, in parts that can be carried to it one by one.

    python tools/offline/pack.py OUT_DIR [--there NAME|FILE ...] [--more NAME ...] [--file FILE ...] [--piece 60]

Wheels of what setup.py asks for and of all that these need in turn, for another Python and platform, as requirements/gpu.txt pins them;
--more: other packages; --file: files that travel beside them, a model or data. Left out is what the machine has: PyTorch, Transformer
Engine, Megatron-Core and vLLM in any case, and what --there names, packages or files such as `pip freeze` writes there.

OUT_DIR/part1, part2 ... are each at most --piece MiB: what is larger is cut and joined again by unpack.py, which lies in each part.
Every part has the same manifest.json, with sizes and SHA-256 of every file and of every piece.
"""

import argparse
import ast
import email
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
THERE = ("torch", "triton", "transformer-engine", "transformer-engine-torch", "megatron-core", "vllm", "setuptools", "pip")
PINS = ("requirements/gpu.txt", "requirements/cpu.txt")  # the first that has a package counts
OLDEST_GLIBC = 5  # of manylinux_2_N
ALIASES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
WHEELS = "wheels"  # in OUT_DIR: what was downloaded
MIB = 2**20
OWN = 256 * 1024  # bytes of a part that are left for manifest and unpack.py


class Refused(Exception):
    """What the user gave is wrong: one line."""


@dataclass(frozen=True)
class Target:
    """The machine that the wheels are for."""

    python: str  # 3.12
    platform: str  # manylinux_2_28_x86_64

    def platforms(self) -> list[str]:
        """The platform and all that are older, as pip wants them named one by one."""
        match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", self.platform)
        if match is None:
            return [self.platform]
        newest, machine = int(match[1]), match[2]
        names = [f"manylinux_2_{n}_{machine}" for n in range(newest, OLDEST_GLIBC - 1, -1)]
        return names + [f"{alias}_{machine}" for n, alias in ALIASES.items() if n <= newest]

    def environment(self) -> dict[str, str]:
        """What markers of requirements are judged by."""
        machine = self.platform.removeprefix("manylinux_2_").partition("_")[2] or self.platform
        return {"python_version": self.python, "python_full_version": f"{self.python}.0", "implementation_name": "cpython",
                "platform_python_implementation": "CPython", "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix",
                "platform_machine": machine}  # fmt: skip


@dataclass
class Wheels:
    """Wheels of packages and of all that these need, in a folder. What is there already is not downloaded again."""

    folder: Path
    target: Target
    there: set[str]
    pins: dict[str, str]
    found: dict[str, Path] = field(default_factory=dict)

    def add(self, requirements: list[Requirement]) -> None:
        """Download those that are not there, and what they need."""
        left = list(requirements)
        seen: set[tuple[str, frozenset[str]]] = set()
        while left:
            wanted = left.pop()
            name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
            if name in self.there or (name, extras) in seen:
                continue
            seen.add((name, extras))
            self.found.setdefault(name, self._wheel(name, wanted))
            left += needs(self.found[name], extras, self.target.environment())

    def _wheel(self, name: str, wanted: Requirement) -> Path:
        if name in self.found:
            return self.found[name]
        version = self.pins.get(name)
        exact = f"{name}=={version}" if version and wanted.specifier.contains(version, prereleases=True) else f"{name}{wanted.specifier}"
        for wheel in self.folder.glob("*.whl"):
            own, number = parse_wheel_filename(wheel.name)[:2]
            if own == name and Requirement(exact).specifier.contains(number, prereleases=True):
                return wheel
        return self._download(exact)

    def _download(self, exact: str) -> Path:
        platforms = [word for name in self.target.platforms() for word in ("--platform", name)]
        before = set(self.folder.glob("*.whl"))
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
            "--implementation", "cp", "--python-version", self.target.python, *platforms, "--dest", str(self.folder), exact,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        new = set(self.folder.glob("*.whl")) - before
        if done.returncode or not new:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel came"]
            raise Refused(f"{exact} cannot be had for Python {self.target.python}, {self.target.platform} ({said[-1]})")
        return new.pop()


def needs(wheel: Path, extras: frozenset[str], environment: dict[str, str]) -> list[Requirement]:
    """What a wheel asks for in this environment, with these of its extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(one for one in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", one))
        lines = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    found = []
    for requirement in map(Requirement, lines):
        if requirement.marker is None or any(requirement.marker.evaluate({**environment, "extra": e}) for e in ("", *extras)):
            found.append(requirement)
    return found


def asked_in_setup() -> list[Requirement]:
    """install_requires of setup.py, which is read and not run."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            return [Requirement(one) for one in ast.literal_eval(node.value)]
    raise Refused(f"{ROOT / 'setup.py'} has no install_requires")


def names_in(given: list[str]) -> set[str]:
    """Packages by their names, or those of a file: a line each, `name==version` and the like."""
    found = set()
    for one in given:
        lines = Path(one).read_text(encoding="utf-8").splitlines() if Path(one).is_file() else [one]
        words = [re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line.strip()) for line in lines]
        found |= {canonicalize_name(word[0]) for word in words if word}
    return found


def pinned() -> dict[str, str]:
    """Versions by package, of the locked lists."""
    found: dict[str, str] = {}
    for file in PINS:
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line):
                found.setdefault(canonicalize_name(match[1]), match[2])
    return found


def write_parts(out: Path, items: list[tuple[str, Path]], limit: int, more: dict) -> dict:
    """Write the parts, each at most `limit` bytes; returns the manifest. items: (kind, file), kind "wheel" or "file"; more: what else the
    manifest tells."""
    room: list[int] = []  # bytes left in each part
    files, content = [], limit - OWN
    for kind, path in sorted(items, key=lambda item: (-item[1].stat().st_size, item[1].name)):
        size, pieces = path.stat().st_size, []
        for number, start in enumerate(range(0, max(size, 1), content)):
            length = min(content, size - start)
            part = next((i for i, left in enumerate(room) if left >= length), len(room))
            if part == len(room):
                room.append(content)
            room[part] -= length
            name = path.name if size <= content else f"{path.name}.{number + 1:03}"
            pieces.append(
                {"part": part + 1, "file": name, "size": length, "sha256": copy(path, start, length, out / f"part{part + 1}" / name)}
            )
        files.append({"kind": kind, "name": path.name, "size": size, "sha256": digest(path), "pieces": pieces})
    manifest = {**more, "parts": len(room), "files": files}
    for number in range(1, len(room) + 1):
        (out / f"part{number}" / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(HERE / "unpack.py", out / f"part{number}" / "unpack.py")
    return manifest


def copy(path: Path, start: int, length: int, to: Path) -> str:
    """Copy a range of a file; its SHA-256."""
    to.parent.mkdir(parents=True, exist_ok=True)
    hashed = hashlib.sha256()
    with path.open("rb") as source, to.open("wb") as output:
        source.seek(start)
        while length:
            block = source.read(min(length, MIB))
            if not block:
                raise Refused(f"{path} became shorter while it was packed")
            hashed.update(block)
            output.write(block)
            length -= len(block)
    return hashed.hexdigest()


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack(given: argparse.Namespace) -> dict:
    """The manifest of what was packed. Raises Refused for what is wrong."""
    if missing := [path for path in given.file if not path.is_file()]:
        raise Refused(f"no file at {missing[0]}")
    if not 1 <= given.piece < float("inf"):
        raise Refused(f"--piece is {given.piece:g}: use 1 MiB or more")
    clear(given.out)
    try:
        asked = [] if given.no_packages else [*asked_in_setup(), *map(Requirement, given.more)]
    except InvalidRequirement as error:
        raise Refused(f"--more: {error}") from None
    target = Target(given.python, given.platform)
    wheels = Wheels(given.out / WHEELS, target, names_in([*THERE, *given.there]), pinned())
    wheels.add(asked)
    items = [("wheel", path) for path in wheels.found.values()] + [("file", path) for path in given.file]
    names = [path.name for _, path in items]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Refused(f"two files have the name {min(twice)}")
    if not items:
        raise Refused("there is nothing to pack")
    return write_parts(given.out, items, int(given.piece * MIB), {"python": given.python, "platform": given.platform})


def clear(out: Path) -> None:
    """Make the directory, without the parts of an earlier packing. Raises Refused for one that holds something else."""
    if out.exists() and not (out.is_dir() and all(re.fullmatch(rf"part\d+|{WHEELS}", one.name) for one in out.iterdir())):
        raise Refused(f"{out} holds something else: name another directory")
    for part in out.glob("part*"):
        shutil.rmtree(part)
    (out / WHEELS).mkdir(parents=True, exist_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the machine's; default 3.12")
    parser.add_argument("--platform", default="manylinux_2_28_x86_64", help="as pip names it; default manylinux_2_28_x86_64")
    parser.add_argument("--there", nargs="*", default=[], metavar="NAME|FILE", help="packages that the machine has")
    parser.add_argument("--more", nargs="*", default=[], metavar="NAME", help="packages besides those of setup.py")
    parser.add_argument("--no-packages", action="store_true", help="files alone")
    parser.add_argument("--file", type=Path, nargs="*", default=[], help="files that travel, too")
    parser.add_argument("--piece", type=float, default=60, help="MiB of a part at most; default 60")
    given = parser.parse_args()
    try:
        manifest = pack(given)
    except (Refused, OSError) as error:  # a place that cannot be written to, a full disk
        print(f"pack.py: {error}", file=sys.stderr)
        return 2
    for one in manifest["files"]:
        where = ", ".join(f"part{part}" for part in dict.fromkeys(piece["part"] for piece in one["pieces"]))
        print(f"{one['size'] / MIB:8.2f} MiB  {where:<14} {one['name']}")
    for number in range(1, manifest["parts"] + 1):
        folder = given.out / f"part{number}"
        print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / MIB:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
