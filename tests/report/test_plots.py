"""What figures show is what the records say; figures as files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import LOST, WRONG, N, attacked, curve, digits, records, results, write
from PIL import Image

from advbench.errors import UserError
from advbench.report import figures, group_figures, plots, run_figures, svg
from advbench.report.collection import Entry, Group
from advbench.report.evidence import UNKNOWN, Evidence
from advbench.report.gallery import BRIGHTER, DARKER, Gallery, Picture
from advbench.report.style import CLEAN, style
from advbench.runs.accuracy import Accuracy


@pytest.fixture(autouse=True)
def styled() -> Iterator[None]:
    with style():
        yield


def three() -> Evidence:
    """Three samples of two classes, by hand: one misclassified at once, one broken, one held."""
    ids = np.array([3, 5, 9])
    clean = records(
        ids,
        broken=np.array([1, 0, 0]),
        label=np.array([1, 1, 0]),
        margin=np.array([-2.0, 3.0, 5.0]),
    )
    first = records(ids[1:], label=np.array([1, 0]), margin=np.array([1.0, 4.0]))
    second = records(
        ids[1:],
        broken=np.array([1, 0]),
        label=np.array([0, 0]),
        margin=np.array([-0.25, 4.5]),
        distance=np.array([0.5, np.nan]),
    )
    labels = np.array([9, 9, 9, 0, 9, 1, 9, 9, 9, 0])
    return Evidence.of({"clean": clean, "first": first, "second": second}, labels)


def test_evidence_by_hand() -> None:
    found = three()
    assert found.truth.tolist() == [0, 1, 0] and found.complete
    assert found.clean.tolist() == [1, 1, 0]
    assert found.final.tolist() == [1, 0, 0]
    assert found.fell.tolist() == [0, 2, -1]
    assert found.final_margin.tolist() == [-2.0, -0.25, 4.0]  # the smallest seen anywhere
    assert np.isnan(found.distance).tolist() == [True, False, True] and found.distance[1] == 0.5
    assert found.columns() == [0, 2]  # the first stage broke nothing
    held, total = found.by_class()
    assert held.tolist() == [[1, 1], [1, 0]] and total.tolist() == [2, 1]
    classes, counts = found.confusion()
    assert classes.tolist() == [0, 1] and counts.tolist() == [[1, 1], [1, 0]]


def test_evidence_without_labels() -> None:
    """Without the data the class of what was wrong at once is not known, and nobody guesses."""
    found = Evidence.of(attacked())
    assert (found.truth == UNKNOWN).sum() == WRONG and not found.complete
    assert found.by_class()[1].sum() == found.confusion()[1].sum() == N - WRONG
    told = Evidence.of(attacked(), digits().test.labels.numpy())
    assert told.complete and told.confusion()[1].sum() == N
    assert told.confusion()[1].trace() == N - WRONG - 2 * LOST


def test_evidence_refuses_other_data() -> None:
    labels = digits().test.labels.numpy()
    with pytest.raises(ValueError, match="not the evaluation"):
        Evidence.of(attacked(), (labels + 1) % 10)
    found = attacked()
    with pytest.raises(ValueError, match="no records of the clean images"):
        Evidence.of({"first": found["first"]})
    found["other"] = records(np.array([10**6]))
    with pytest.raises(ValueError, match="other"):
        Evidence.of(found)


def test_stages_show_wilson() -> None:
    figure = plots.stages(results())
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["clean", "first", "second"]
    bars = [line for c in axes.collections for line in c.get_segments()]  # pyright: ignore
    wanted = [
        [100 * end for end in Accuracy.of(k, N).ci95 or ()]
        for k in (N - WRONG, N - WRONG - LOST, 18)
    ]
    assert np.allclose([[bar[0][0], bar[1][0]] for bar in bars], wanted)


def test_curve_starts_clean_and_ends_at_the_threat() -> None:
    found = curve("net", 0.9, 0.7, 0.5)
    assert np.allclose(plots.radii(found), [0.05, 0.1, 0.15])
    assert plots.radii(results()) == []
    (axes,) = plots.curve({"net": found}).axes
    x, y = axes.lines[0].get_data()
    assert np.allclose(x, [0, 0.05, 0.1, 0.15]) and np.allclose(y, [95, 90, 70, 50])  # pyright: ignore


def test_a_curve_ends_where_it_was_stopped() -> None:
    found = curve("net", 0.9, 0.9, 0.9, missing=2)
    assert plots.radii(found) == [0.05]
    (plate,) = run_figures.Dossier(Entry(Path("net"), found)).plates()
    assert plate.caption.endswith(
        "Unfinished: the budget was spent before the end of eps-0.1, eps-0.15."
    )
    (axes,) = plate.draw().axes
    assert axes.lines[0].get_xdata().tolist() == [0, 0.05]  # pyright: ignore
    assert axes.get_xlim()[1] > 0.15  # what is missing is to be seen
    assert axes.get_title(loc="left") == "unfinished: 2 radii to go"
    at_once = curve("net", 0.9, 0.9, 0.9, missing=3)
    (plate,) = run_figures.Dossier(Entry(Path("net"), at_once)).plates()
    assert plate.name == "stages"


def test_stages_that_never_ran_are_not_shown() -> None:
    found = results(lost=(LOST, LOST, 0), missing=("second", "third"))
    (plate,) = run_figures.Dossier(Entry(Path("net"), found)).plates()
    assert "Unfinished: the budget was spent before the end of second, third." in plate.caption
    (axes,) = plate.draw().axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["clean", "first", "unfinished: second"]
    over = results(lost=(LOST, N - WRONG - LOST, 0))
    assert over.begun == over.stages  # nobody was left for the third


def test_heat_maps_tell_numbers() -> None:
    found, names = three(), ("zero", "one")
    (axes,) = plots.classes(found, names).axes
    assert [t.get_text() for t in axes.texts] == ["50", "50", "100", "0"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["zero (2)", "one (1)"]
    (axes,) = plots.confusion(found, names).axes
    assert [t.get_text() for t in axes.texts] == ["1", "1", "1"]  # a zero is left empty


def test_many_classes() -> None:
    """Of hundreds of classes the worst are listed, and the confusion is an image."""
    n = 400
    ids = np.arange(n)
    clean = records(ids, label=ids // 2, margin=np.ones(n))
    broken = ids % 50 == 0
    first = records(ids, broken=broken, label=np.where(broken, 7, ids // 2), margin=np.ones(n))
    found = Evidence.of({"clean": clean, "first": first})
    worst = found.classes()[plots.worst_classes(found)]
    assert len(worst) == plots.MOST_CLASSES
    assert set(worst) >= set((ids[broken] // 2).tolist())
    (axes,) = plots.confusion(found, ()).axes
    assert len(axes.images) == 1 and not axes.texts
    assert len(axes.get_xticks()) <= 25


def test_margins_count_every_image() -> None:
    found = Evidence.of(attacked())
    (axes,) = plots.margins(found).axes
    heights = [sum(bar.get_height() for bar in c) for c in axes.containers]  # pyright: ignore
    assert heights == [N, N]


def test_learning_reads_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,loss,val_clean,val_robust\n1,2.0,0.5,\n2,1.0,0.75,0.25\n")
    columns = run_figures.read_metrics(path)
    assert columns["val_clean"].tolist() == [0.5, 0.75] and np.isnan(columns["val_robust"][0])
    upper, lower = plots.learning(columns, best=2).axes
    assert upper.lines[0].get_ydata().tolist() == [50, 75]  # pyright: ignore
    assert lower.lines[0].get_ydata().tolist() == [2, 1]  # pyright: ignore
    for text in ("", "epoch,loss\n", "epoch,loss\none,2\n", "loss\n1\n", "epoch,loss\n,2\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="not a table of epochs"):
            run_figures.read_metrics(path)


def entry(name: str, **changes: Any) -> Entry:
    return Entry(Path(name), results(name, **changes))


def test_sweeps_are_found() -> None:
    def member(jump: float, correct: int, **more: object) -> Entry:
        settings = {"defense": "jumprelu", "defense.jump": jump, "recipe": "pgd_at", **more}
        return entry(f"r{jump}{more}", settings=settings, lost=(N - WRONG - correct,))

    found = [member(1, 10), member(0, 30), member(0.5, 20), entry("other")]
    (sweep,) = group_figures.sweeps(found)
    assert sweep.key == "defense.jump"
    assert [value for value, _, _ in sweep.rows] == [0, 0.5, 1]
    assert [robust.acc for _, _, robust in sweep.rows] == [30 / N, 20 / N, 10 / N]
    assert group_figures.sweeps(found[:2]) == []  # two points are no curve
    # A second setting that moves along makes it another comparison.
    assert group_figures.sweeps([member(0, 1, steps=1), member(1, 2, steps=2), member(2, 3)]) == []
    (axes,) = plots.tradeoff(sweep.key, sweep.rows).axes
    assert [t.get_text() for t in axes.texts] == ["0", "0.5", "1"]
    assert not sweep.repeated
    told = [plate.caption for plate in sweep.plates()]
    assert all(text.startswith("jumprelu, pgd_at, linf 0.15, pgd 1 (weak).") for text in told)
    again = replace(results("again"), protocol={"name": "pgd", "version": "1", "seed": 7})
    more = Entry(Path("again"), replace(again, settings=found[0].results.settings))
    (sweep,) = group_figures.sweeps([found[0], found[1], more, found[2]])
    assert [robust.acc for _, _, robust in sweep.rows] == [30 / N, 20 / N, 10 / N]
    assert sweep.repeated and all("the lowest" in plate.caption for plate in sweep.plates())


def test_a_sweeps_axis_has_the_values_to_scale() -> None:
    values = (0.0, 0.5, 0.9, 0.99, 0.999)
    rows = [(value, Accuracy.of(38, N), Accuracy.of(20, N)) for value in values]
    (axes,) = plots.sweep("momentum", rows).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.5", "0.999"]
    assert list(axes.get_xticks()) == [0, 0.5, 0.999]
    assert axes.get_xscale() == "linear" and axes.get_ylim() == (-2, 102)
    assert len(axes.collections) == 2  # the intervals
    assert [list(line.get_xdata()) for line in axes.lines] == [list(values)] * 2  # type: ignore


def test_the_unfinished_comes_last_and_is_called_that() -> None:
    found = [entry("short", lost=(0, 0), missing=("second",)), entry("whole")]
    assert [e.results.run for e in group_figures.ranked(found)[0]] == ["whole", "short"]
    (axes,) = group_figures.board_plate(found).draw().axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["whole", "unfinished: short"]


def jumped(jump: float, *robust: float, **changes: Any) -> Entry:
    """A curve of one run with that jump put on."""
    settings = {**results().settings, "defense": "jumprelu", "defense.jump": jump}
    return Entry(
        Path(f"j{jump}"), replace(curve("run+jumprelu", *robust, **changes), settings=settings)
    )


def test_curves_are_told_apart_by_their_settings() -> None:
    """All have one run name; of a model that was attacked twice the lower bound is shown."""
    again = jumped(0.5, 0.8, 0.7)
    again = Entry(
        again.folder, replace(again.results, protocol={**again.results.protocol, "seed": 1})
    )
    plate = group_figures.curves_plate([jumped(0, 0.9, 0.5), again, jumped(0.5, 0.8, 0.6)])
    assert plate is not None and "Of repeated evaluations the lowest." in plate.caption
    (axes,) = plate.draw().axes
    shown = {str(line.get_label()): line.get_ydata()[-1] for line in axes.lines}  # pyright: ignore
    assert shown == {"jump 0.5": pytest.approx(60), "jump 0": pytest.approx(50)}
    assert list(shown) == ["jump 0.5", "jump 0"]


def test_labels_tell_what_differs() -> None:
    def label(*found: Entry) -> list[str]:
        return group_figures.labels([Group((each,)) for each in found])

    one, other = jumped(0, 0.9), jumped(0, 0.9)
    seeded = {**one.results.settings, "seed": 1}
    assert label(one) == ["run+jumprelu"]
    assert label(one, Entry(Path("b"), replace(one.results, settings=seeded))) == [
        "run+jumprelu, seed 0", "run+jumprelu, seed 1",
    ]  # fmt: skip
    attacked = Entry(Path("b"), replace(one.results, protocol={**one.results.protocol, "seed": 7}))
    assert label(one, attacked) == ["run+jumprelu, attack seed 0", "run+jumprelu, attack seed 7"]
    assert label(one, Entry(Path("b"), other.results)) == ["run+jumprelu, j0", "run+jumprelu, b"]


def test_means_over_seeds_are_called_that() -> None:
    def member(jump: float, seed: int, correct: int) -> Entry:
        settings = {**results().settings, "defense.jump": jump, "seed": seed}
        return entry(f"s{seed}", settings=settings, lost=(N - WRONG - correct,))

    found = [member(jump, seed, 20 + 4 * seed) for jump in (0, 1, 2) for seed in (0, 1, 2)]
    plate = group_figures.board_plate(found[:3])
    assert "Means over 3 training seeds" in plate.caption
    (axes,) = plate.draw().axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["none, convnet, pgd_at (3 seeds)"]
    assert "sd over training seeds" in axes.get_title(loc="left")
    ends = [c.get_segments()[0][:, 0] for c in axes.collections]  # pyright: ignore
    assert any(np.allclose(pair, [100 * (24 - 4) / N, 100 * (24 + 4) / N]) for pair in ends)
    (sweep,) = group_figures.sweeps(found)
    for plate in sweep.plates():
        assert "Means over 3 training seeds; wide: ± sd over them." in plate.caption
        (axes,) = plate.draw().axes
        assert "wide: ± sd over training seeds" in axes.get_title(loc="left")
    plate = group_figures.board_plate([*found[:3], member(3, 0, 20)])
    assert "Means over 1 to 3 training seeds" in plate.caption
    (axes,) = plate.draw().axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["jump 0 (3 seeds)", "jump 3"]
    (alone,) = group_figures.board_plate(found[:1]).draw().axes
    assert alone.get_title(loc="left") == "" and len(alone.collections) == 2


def test_what_was_not_attacked_is_drawn_as_clean_alone() -> None:
    def bare(jump: float) -> Entry:
        settings = {**results().settings, "defense.jump": jump}
        return entry(f"j{jump}", settings=settings, lost=())

    found = [bare(jump) for jump in (0, 1, 2)]
    assert group_figures.sweeps(found) == []
    (axes,) = group_figures.board_plate(found).draw().axes
    assert [c.get_label() for c in axes.containers] == ["clean"]
    assert len(axes.get_yticklabels()) == 3
    (axes,) = group_figures.board_plate([*found, entry("attacked")]).draw().axes
    assert [c.get_label() for c in axes.containers] == ["clean", "robust"]
    ranked = group_figures.ranked([found[0], entry("attacked", lost=(N - WRONG - 1,))])
    assert [e.results.run for e in ranked[0]] == ["attacked", "j0"]
    drawn = run_figures.Dossier(
        found[0], evidence=Evidence.of({"clean": attacked()["clean"]})
    ).plates()
    assert [plate.name for plate in drawn] == ["classes"]


def test_labels_of_a_sweep_do_not_collide() -> None:
    rows = [(float(i), Accuracy.of(38, N), Accuracy.of(20 + i % 2, N)) for i in range(5)]
    figure = plots.tradeoff("jump", rows)
    figure.savefig(io.BytesIO())
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 5
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_perturbations_in_colour() -> None:
    """Of gray images darker is blue and brighter orange, of others the change is around gray."""
    delta = np.array([[-0.1, 0.0, 0.05]])

    def shown(channels: int) -> np.ndarray:
        clean = np.full((1, 3, channels), 0.5)
        picture = Picture(0, clean, clean + delta[..., None], "a", "b", 0.1)
        return Gallery((picture,), 5.0, "linf").change(picture)

    gray = shown(1) * 255
    assert np.allclose(gray[0, 0], DARKER) and np.allclose(gray[0, 1], 255)
    assert np.allclose(gray[0, 2], (np.array(BRIGHTER) + 255) / 2)
    assert np.allclose(shown(3)[0, :, 0], [0, 0.5, 0.75])


def test_pictures_in_print() -> None:
    clean = np.zeros((2, 2, 3))
    picture = Picture(7, clean, clean + 0.1, "cat", "dog", 0.1)
    figure = plots.pictures(Gallery((picture,), 5.0, "linf"))
    assert [axes.get_title() for axes in figure.axes] == ["cat", "linf 0.1, times 5", "dog"]


def test_svg_takes_the_theme() -> None:
    drawing = svg.inline(plots.stages(results("a $ b")), "one", 'say "this"')
    assert drawing.startswith("<svg viewBox=") and drawing.endswith("</svg>")
    assert 'aria-label="say &quot;this&quot;"' in drawing
    assert "var(--clean)" in drawing and "var(--ink)" in drawing and CLEAN not in drawing
    assert ">clean</text>" in drawing  # text as text
    for word in ("font-family", "<style", "<metadata", "http", 'id="axes'):
        assert word not in drawing, word


def test_svg_escapes_names() -> None:
    hostile = "</svg><script>x</script>"
    found = results(stages=tuple(replace(s, name=hostile) for s in results().stages))
    drawing = svg.inline(plots.stages(found), "one", "x")
    assert "<script" not in drawing and drawing.count("</svg>") == 1


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in/a", results("net"), images=True)
    figures.save([tmp_path / "in"], tmp_path / "out")
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.p*")}
    alone = ("stages", "classes", "confusion", "margins", "images")
    shared = ["leaderboard-digits-linf_0.15-pgd", *(f"a/{name}" for name in alone)]
    assert names == {f"{name}.{kind}" for name in shared for kind in ("png", "pdf")}
    assert len(capsys.readouterr().out.splitlines()) == 2
    with Image.open(tmp_path / "out/a/stages.png") as image:
        assert image.width == pytest.approx(3.4 * 300, abs=1)
    assert (tmp_path / "out/a/stages.pdf").read_bytes().startswith(b"%PDF")
    twice = [plots.stages(results()) for _ in range(2)]
    for i, figure in enumerate(twice):  # same input, same file
        figures._write(run_figures.Plate(f"{i}", "", "", lambda figure=figure: figure), tmp_path)
    assert (tmp_path / "0.pdf").read_bytes() == (tmp_path / "1.pdf").read_bytes()


def test_names_of_files_stay_in_the_folder() -> None:
    taken: set[str] = set()
    assert figures._free("../../etc/passwd", taken) == "etc_passwd"
    assert figures._free("etc_passwd", taken) == "etc_passwd-2"
    assert figures.slug("...") == "_"
    assert (
        len(figures.slug("x" * 300 + "-hash")) <= 90 and figures.slug("x" * 300 + "-1")[-2:] == "-1"
    )
