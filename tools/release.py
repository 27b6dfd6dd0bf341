"""Set the version of all five packages, or check that they agree.

    python tools/release.py 0.2.0     # writes VERSION and every pin of one package on another
    python tools/release.py --check   # exit code 1, and what is wrong, unless every pin equals VERSION

The version stands once, in ``VERSION``. The packages pin each other exactly, because they are released together.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# PEP 440 without local versions, in its normal form: 1.2.3, 1.2.3a1, 1.2.3rc1, 1.2.3.post1, 1.2.3.dev1.
VERSION = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?")
# "modalities-core[torch]==0.1.0", in quotes, with any comparison, so that a loose pin is found too.
PIN = re.compile(r'"(?P<name>modalities-[a-z]+)(?P<extras>\[[a-z,-]+\])?(?P<version>[<>=!~][^";]*)?(?=[";])')


def manifests() -> list[Path]:
    """The packages' pyproject.toml files."""
    return sorted(ROOT.glob("packages/*/pyproject.toml"))


def pins(text: str) -> list[re.Match[str]]:
    """Where ``text``, a pyproject.toml, requires another of our packages; its own name is no requirement."""
    own = re.search(r'^name = "([^"]+)"', text, re.MULTILINE)
    return [match for match in PIN.finditer(text) if own is None or match["name"] != own[1]]


def set_version(version: str) -> None:
    """Write ``version`` to VERSION and into every pin."""
    for path in manifests():
        text = path.read_text(encoding="utf-8")
        for match in reversed(pins(text)):
            text = f'{text[: match.start()]}"{match["name"]}{match["extras"] or ""}=={version}{text[match.end() :]}'
        path.write_text(text, encoding="utf-8")
    (ROOT / "VERSION").write_text(version + "\n", encoding="utf-8")


def problems() -> list[str]:
    """What keeps the packages from agreeing, one sentence each."""
    version = (ROOT / "VERSION").read_text(encoding="utf-8").strip()
    found = [] if VERSION.fullmatch(version) else [f"VERSION: {version!r} is not a version such as 0.2.0 or 0.2.0rc1"]
    for path in manifests():
        found += [
            f"{path.relative_to(ROOT)}: {match[0][1:]!r} should pin =={version}"
            for match in pins(path.read_text(encoding="utf-8"))
            if match["version"] != f"=={version}"
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="?", help="the new version, for example 0.2.0 or 0.2.0rc1")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 unless every pin equals it")
    arguments = parser.parse_args()
    if arguments.check == (arguments.version is not None):
        parser.error("give either a version or --check")
    if arguments.version is not None:
        if not VERSION.fullmatch(arguments.version):
            parser.error(f"{arguments.version!r} is not a version such as 0.2.0 or 0.2.0rc1")
        set_version(arguments.version)
    found = problems()
    print("\n".join(found) or f"VERSION and every pin say {(ROOT / 'VERSION').read_text(encoding='utf-8').strip()}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
