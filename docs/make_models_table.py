"""Writes the tables of docs/models.md from runs of every model type, or checks them: `--check`.

    python docs/make_models_table.py [--check]

tests/test_switch_glu.py and tests/test_qwen3_next.py run the same and compare each line with the page.
"""

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.switch_configs import ASKED, OTHERS, OURS  # noqa: E402
from tests.support.switch_models import conversions_of, measure_row  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
GROUPS = {"own": OURS, "asked": ASKED, "others": OTHERS}


def block(group: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- table {group} -->\n).*?(?=<!-- end -->)", re.DOTALL)


def render(group: str) -> str:
    header = ["model_type", "K", "slots per layer", *conversions_of(next(iter(GROUPS[group])))]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for model_type in GROUPS[group]:
        with tempfile.TemporaryDirectory() as directory:
            line, _ = measure_row(model_type, Path(directory))
        print(line, flush=True)
        lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> int:
    page = PAGE.read_text()
    for group in GROUPS:
        table = render(group)
        page = block(group).sub(lambda _, table=table: table, page, count=1)
    if "--check" in sys.argv[1:]:
        return int(page != PAGE.read_text())
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
