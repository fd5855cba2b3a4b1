"""What a report of pip-audit (JSON) means: exit code 0 no hole is known, 1 some are, 3 something was not looked up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def verdict(report: str) -> tuple[int, list[str]]:
    """The exit code and lines to print."""
    try:
        packages = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return 3, ["pip-audit wrote no report: is there a network?"]
    holes = [_line(package, hole) for package in packages for hole in package.get("vulns", ())]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    missing = [f"not looked up: {', '.join(skipped) or 'anything'}"] if skipped or not packages else []
    code = 1 if holes else 3 if missing else 0
    return code, holes + missing or [f"no hole is known in {len(packages)} packages"]


def _line(package: dict[str, str], hole: dict[str, Any]) -> str:
    fixed = ", ".join(hole["fix_versions"]) or "no version"
    return f"{package['name']} {package['version']}: {hole['id']}, fixed in {fixed}"


if __name__ == "__main__":
    code, lines = verdict(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("\n".join(lines))
    sys.exit(code)
