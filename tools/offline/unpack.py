"""Joins, checks and installs what pack.py made. Needs nothing but Python 3.10 or newer.

    python unpack.py PART_DIR ... --target SITE_DIR [--files FILES_DIR]

Packages go to SITE_DIR, for PYTHONPATH; other files to FILES_DIR. PART_DIR: the parts, or a directory that holds them. Nothing is
written before every piece is found and checked; one that is missing or damaged is one line, and exit code 2. Wheels are unzipped: commands
and headers of packages are left out.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

MIB = 2**20


class Refused(Exception):
    """One line for the user."""


def parts_in(folders: list[Path]) -> tuple[dict, dict[int, Path]]:
    """The manifest, and the parts that are there by number. Raises Refused where there is none, or some belong to another packing."""
    manifests: dict[Path, dict] = {}
    for folder in folders:
        for file in sorted([folder / "manifest.json", *folder.glob("*/manifest.json")]):
            if file.is_file():
                manifests[file.parent] = read(file)
    if not manifests:
        raise Refused(f"no manifest.json in {', '.join(map(str, folders))}: name the folders that pack.py made")
    manifest = next(iter(manifests.values()))
    for folder, other in manifests.items():
        if other != manifest:
            raise Refused(f"{folder} is of another packing than {next(iter(manifests))}: bring all parts of one")
    pieces = [piece for one in manifest["files"] for piece in one["pieces"]]
    there = {}
    for number in range(1, manifest["parts"] + 1):
        names = [piece["file"] for piece in pieces if piece["part"] == number]
        best = max(manifests, key=lambda folder: sum((folder / name).is_file() for name in names))
        there[number] = best
    return manifest, there


def read(file: Path) -> dict:
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        pieces = [piece for one in manifest["files"] for piece in one["pieces"]]
        whole = all({"kind", "name", "size", "sha256"} <= one.keys() for one in manifest["files"])
        if manifest["parts"] and whole and all({"file", "part", "size", "sha256"} <= piece.keys() for piece in pieces):
            return manifest
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise Refused(f"{file} is damaged: bring its part again")


def check(manifest: dict, there: dict[int, Path]) -> None:
    """Raise Refused for the first piece that is missing or is not what was packed."""
    for one in manifest["files"]:
        for piece in one["pieces"]:
            file = there[piece["part"]] / piece["file"]
            if not file.is_file():
                raise Refused(
                    f"{piece['file']} is missing, of part {piece['part']} of {manifest['parts']}: bring part{piece['part']} here, too"
                )
            if file.stat().st_size != piece["size"] or digest(file) != piece["sha256"]:
                raise Refused(f"{file} is damaged ({file.stat().st_size} of {piece['size']} bytes): bring part{piece['part']} again")


def digest(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(MIB):
            hashed.update(block)
    return hashed.hexdigest()


def join(one: dict, there: dict[int, Path], to: Path) -> None:
    """A file out of its pieces, complete or not at all. Raises Refused where it is not what was packed."""
    part = to.with_name(to.name + ".part")
    with part.open("wb") as output:
        for piece in one["pieces"]:
            with (there[piece["part"]] / piece["file"]).open("rb") as source:
                shutil.copyfileobj(source, output, MIB)
    if digest(part) != one["sha256"]:
        part.unlink()
        raise Refused(f"{one['name']} is not what was packed, though its pieces are: pack it again")
    os.replace(part, to)


def install(wheel: Path, target: Path) -> None:
    """Unzip a wheel. Of what it would put elsewhere libraries and data go beside it."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            top, _, rest = member.filename.partition("/")
            if not top.endswith(".data"):
                archive.extract(member, target)
                continue
            kind, _, inner = rest.partition("/")
            if kind in ("purelib", "platlib", "data") and inner and not member.is_dir():
                member.filename = inner
                archive.extract(member, target)


def unpack(folders: list[Path], target: Path, files: Path | None) -> str:
    """What was done, in a line."""
    manifest, there = parts_in(folders)
    others = [one for one in manifest["files"] if one["kind"] != "wheel"]
    if others and files is None:
        raise Refused(f"there are files besides packages ({others[0]['name']}): say with --files where they go")
    check(manifest, there)
    wheels = [one for one in manifest["files"] if one["kind"] == "wheel"]
    if wheels:
        target.mkdir(parents=True, exist_ok=True)
    for one in wheels:
        joined = target / one["name"]
        join(one, there, joined)
        install(joined, target)
        joined.unlink()
    for one in others:
        files.mkdir(parents=True, exist_ok=True)
        join(one, there, files / one["name"])
    here = "{}.{}".format(*sys.version_info[:2])
    other = f"; they are for Python {manifest['python']}, and this is {here}" if wheels and here != manifest["python"] else ""
    told = [f"{len(wheels)} packages in {target}{other}"] if wheels else []
    return "; ".join([*told, *([f"{len(others)} files in {files}"] if others else [])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", type=Path, nargs="+", metavar="PART_DIR")
    parser.add_argument("--target", type=Path, required=True, help="where packages go")
    parser.add_argument("--files", type=Path, help="where other files go")
    given = parser.parse_args()
    try:
        print(unpack(given.parts, given.target, given.files))
    except (Refused, zipfile.BadZipFile, OSError) as error:  # a place that cannot be written to, a full disk
        print(f"unpack.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
