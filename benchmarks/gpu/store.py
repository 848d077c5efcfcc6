"""The results file: every finished case is written at once, so that a killed call loses nothing.

A file belongs to one key: scale, device, versions and the text of the sources. A later call with the
same key goes on with the same file; after a change it starts another.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.gpu.cases import Case, Scale
from roofline.hardware import Hardware

SUITE = "gpu"
"""Marks results files of this suite."""
RESULTS, PROFILES = "results", "profiles"
"""What a file keeps of each case: how long it took beside the predictions, and the kernels of one call."""
FINISHED = ("done", "no room", "skipped")
"""Outcomes that another call would not change; a failed case is tried again."""
CUT_OFF = "cut off"
"""Outcome of a case that was not done when its call ended; it is tried again."""
MORE_TIME = 1.25
"""A case that was cut off is given so many times as long."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
SOURCES = ("models", "roofline", "jaxrl", "benchmarks/gpu")


def versions() -> dict[str, str]:
    """Of python and of the packages that are installed here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def digest_of_sources() -> str:
    """Changes when any source file that a result depends on does; needs no git."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((record.ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(record.ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """One results file, its content, and which outcomes of it this call adds to: times or profiles."""

    def __init__(self, path: Path, content: dict[str, Any], kept: str) -> None:
        self.path, self.content, self._kept = path, content, kept

    @classmethod
    def open(
        cls, folder: Path, scale: Scale, device: str, commit: str | None,
        more: Sequence[Path] = (record.RESULTS,), *, profiled: bool = False, mixed: bool = False,
    ) -> Store:  # fmt: skip
        """The file of this key in `folder`, or a copy of the one in `more`, or a new one.

        commit: what HEAD is, for a checkout without git; None asks git. mixed: else the newest file that
        differs in its sources alone; each of its results keeps the sources that it was made with.
        """
        kept = PROFILES if profiled else RESULTS
        key = {
            "scale": scale.name, "device": device, "sources": digest_of_sources(),
            "versions": versions(),
        }  # fmt: skip
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        others: list[tuple[Path, dict[str, Any]]] = []
        for path in (p for where in (folder, *more) for p in sorted(where.glob(f"{name}-*.json"))):
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("key") == key:
                return cls(folder / path.name, content, kept)._without_begun()
            if mixed and {**content.get("key", {}), "sources": key["sources"]} == key:
                others.append((path, content))
        if others:
            path, content = max(others, key=lambda other: other[1]["provenance"]["date"])
            content["key"] = key
            return cls(folder / path.name, content, kept)._without_begun()
        made = {**record.provenance(key["versions"]), "device": device}
        made["commit"] = commit or made["commit"]
        content = {"suite": SUITE, "key": key, "provenance": made, RESULTS: {}, PROFILES: {}}
        return cls(_new_path(folder, name), content, kept)

    @property
    def outcomes(self) -> dict[str, dict[str, Any]]:
        """Of every case that this or an earlier call timed, or profiled if this one profiles."""
        return self.content[self._kept]

    def _without_begun(self) -> Store:
        """Whatever was begun when the call of this file was killed was cut off."""
        if begun := self.content.pop("begun", None):
            cut = {"status": CUT_OFF, "why": "the call was killed while it ran", "date": _now()}
            self.content[begun["of"]][begun["case"]] = cut
        return self

    def begin(self, name: str) -> None:
        """Note on disk what runs now, in case nobody will be there to say how it ended."""
        self.content["begun"] = {"of": self._kept, "case": name}
        self.save()

    def expected_s(self, case: Case, scale: Scale) -> float:
        """Seconds that the case should take: as long as the longest of its kind did, or scale.first_s; one that
        was cut off longer than it had."""
        results = self.outcomes
        names = [one.name for one in scale.cases() if one.kind == case.kind]
        took = [results[name].get("wall_s", 0.0) for name in names if name in results]
        own = results.get(case.name, {})
        had = MORE_TIME * own.get("wall_s", 0.0) if own.get("status") == CUT_OFF else 0.0
        return min(max([scale.first_s, had] if not any(took) else [*took, had]), scale.longest_s)

    def was_tried(self, case: Case) -> bool:
        """It has run without success."""
        return case.name in self.outcomes and not self.is_finished(case)

    def is_finished(self, case: Case) -> bool:
        """Measured or profiled, or known not to work on this device."""
        return self.outcomes.get(case.name, {}).get("status") in FINISHED

    def hardware(self, model: str) -> Hardware | None:
        """The calibration of a model on this device, if it was made."""
        result = self.content[RESULTS].get(Case(kind="calibrate", model=model).name, {})
        return Hardware.from_json(result["hardware"]) if "hardware" in result else None

    def put(self, name: str, result: Mapping[str, Any]) -> None:
        """Store the outcome of a case, on disk too."""
        self.content.pop("begun", None)
        if "why" in result:
            result = {**result, "why": _without_places(result["why"])}
        sources = self.content["key"]["sources"]
        self.outcomes[name] = {**result, "date": _now(), "sources": sources}
        self.save()

    def save(self) -> None:
        """Write the file in one move. Raises: ValueError if it would name a folder of this machine."""
        text = json.dumps(self.content, indent=1) + "\n"
        for place in (str(record.ROOT), str(Path.home()) + "/"):
            if place in text:
                raise ValueError(f"results of {self.path.name} name the path {place}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _without_places(text: str) -> str:
    return text.replace(str(record.ROOT), ".").replace(str(Path.home()), "~")


def _new_path(folder: Path, name: str) -> Path:
    """DEVICE-DATE.json; with a number where another key of the same day has it."""
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    path, number = folder / f"{name}-{today}.json", 2
    while path.exists():
        path, number = folder / f"{name}-{today}-{number}.json", number + 1
    return path


def load_results(folder: Path) -> list[dict[str, Any]]:
    """All results of this suite in a folder, on real shapes, oldest first."""
    every = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    ours = [
        r for r in every
        if isinstance(r, dict) and r.get("suite") == SUITE and r["key"]["scale"] == "gpu"
    ]  # fmt: skip
    return sorted(ours, key=lambda r: r["provenance"]["date"])
