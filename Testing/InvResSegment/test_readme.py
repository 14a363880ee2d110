"""What the README quotes from the panel is what the panel says."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def quoted() -> list[str]:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = text.split("### Troubleshooting", 1)[1].split("\n#", 1)[0]
    return re.findall(r'^\| "(.+?)" \|', section, flags=re.MULTILINE)


def test_the_table_is_found():
    assert len(quoted()) >= 8


@pytest.mark.parametrize("sentence", quoted())
def test_a_sentence_in_troubleshooting_is_one_of_the_panels(sentence):
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in (REPOSITORY / "InvResSegment" / "InvResSegmentLib").glob("*.py")
    )
    pattern = r"\{\w+\}".join(re.escape(part.strip(" ")) for part in sentence.replace("...", "\0").split("\0"))
    pattern = pattern.replace(r"\{\w+\}", r"\s?\{\w+\}\s?")
    assert re.search(pattern, sources), sentence
