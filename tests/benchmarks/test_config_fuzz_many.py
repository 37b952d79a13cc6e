"""Ten thousand changed configurations: refused with the field's name, or they work.

The same changes as in `test_config_fuzz`, from fixed seeds; of the accepted runs that need nothing
large or absent, some hundred are trained.
"""

from __future__ import annotations

from test_config_fuzz import affordable, one_run, one_study, one_text, trained

RUNS, STUDIES, TEXTS = 5000, 3000, 2000
TRAINED = 200


def test_ten_thousand_changed_configurations(tmp_path, capsys):
    accepted = [run for seed in range(RUNS) if (run := one_run(seed)) is not None]
    studies = sum(one_study(seed) is not None for seed in range(STUDIES))
    for seed in range(TEXTS):
        one_text(seed, tmp_path / "study.yaml")
    small = [run for run in accepted if affordable(run)][:TRAINED]
    for number, run in enumerate(small):
        trained(run, tmp_path / str(number))
    with capsys.disabled():
        print(
            f"\n{RUNS} runs ({len(accepted)} accepted, {len(small)} of them trained), {STUDIES}"
            f" studies ({studies} accepted), {TEXTS} texts: every refusal named its field"
        )
    assert len(small) == TRAINED
