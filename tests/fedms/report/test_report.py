"""The report: right numbers and fair words, from records alone, in one file that needs nothing else."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import json
import math
import re
import statistics
from html.parser import HTMLParser

import pytest
from fedms import report
from fedms.errors import RunFolderError
from fedms.report.figures import accuracy_by_bytes_figure
from fedms.report.tables import marked_table
from fedms.storage.provenance import provenance
from fedms.storage.records import RunRecords
from synthetic import write_run

METHODS = ("local", "fedavg", "fedavg_prior", "fedavg_ft", "fedms")


class Page(HTMLParser):
    """What a test asks a page for: tags with attributes, table cells, list items, headings, all visible text."""

    VOID = {"meta", "br", "link", "img", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((tuple(self.open), data.strip()))

    def inside(self, tag) -> list[str]:
        return [text for path, text in self.texts if tag in path]

    @property
    def visible(self) -> str:
        return " ".join(text for path, text in self.texts if not {"style", "script"} & set(path))


def page_of(folder) -> Page:
    return Page(report.write_report(folder).read_text(encoding="utf-8"))


def edit(path, change):
    """Pass every record of a .jsonl file, or the one of a .json file, through `change`."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    path.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Five methods, three seeds."""
    folder = tmp_path_factory.mktemp("study")
    for method in METHODS:
        for seed in range(3):
            write_run(folder / f"{method}-seed{seed}", method, seed)
    return folder


def findings(folder) -> list[dict[str, str]]:
    return report.findings(*report.read_runs(folder))


def finding(folder, words: str) -> dict[str, str]:
    found = [f for f in findings(folder) if words in f["text"]]
    assert len(found) == 1, found
    return found[0]


# The page

def test_a_single_run(tmp_path):
    path = write_run(tmp_path / "run")
    page = page_of(path)
    summary = json.loads((path / "summary.json").read_text())
    assert f"{100 * summary['personalized_accuracy']['mean']:.1f} %" in page.inside("dd")
    assert page.inside("h3") == ["Each client on its own test samples", "On validation samples",
                                 "What each client gains over training alone", "How each client mixes the experts", "Depth"]
    assert page.inside("label")[-3:] == ["rounds", "bytes", "operations"]      # the axes of one chart
    assert "Every client of fedms, seed 0" in page.visible and "Every round of fedms, seed 0" in page.visible
    assert report.ONE_SEED in page.inside("header")[2]


def test_the_numbers_of_a_study_are_those_of_the_summaries(study):
    rows = {row["method"]: row for row in report.comparison(report.read_runs(study)[0])}
    assert list(rows) == ["zero-shot", *METHODS]
    for method in METHODS:
        summaries = [json.loads((study / f"{method}-seed{s}" / "summary.json").read_text()) for s in range(3)]
        for name, keys in {"personalized": ("personalized_accuracy", "mean"), "bytes_up": ("bytes_up",),
                           "worst10": ("personalized_accuracy", "worst10"), "global_test": ("global_test_accuracy",)
                           }.items():
            values = [s[keys[0]] if len(keys) == 1 else s[keys[0]][keys[1]] for s in summaries]
            assert rows[method][name].mean == pytest.approx(statistics.fmean(values))
            assert rows[method][name].std == pytest.approx(statistics.stdev(values))
    page = page_of(study)
    start = page.texts.index((("html", "body", "main", "div", "table", "tbody", "tr", "th"), "fedms"))
    stat = rows["fedms"]["personalized"]
    assert page.texts[start + 1][1] == f"{100 * stat.mean:.1f} ± {100 * stat.std:.1f}"
    alone = [{c["id"]: c["accuracy"]["personalized"] for c in RunRecords.read(study / f"local-seed{s}").clients
              if not c["unseen"]} for s in range(3)]
    ours = [{c["id"]: c["accuracy"]["personalized"] for c in RunRecords.read(study / f"fedavg-seed{s}").clients
             if not c["unseen"]} for s in range(3)]
    below = statistics.fmean(sum(ours[s][i] < alone[s][i] for i in alone[s]) / len(alone[s]) for s in range(3))
    assert rows["fedavg"]["below_local"].mean == pytest.approx(below)
    assert rows["zero-shot"].get("global_test") is None  # nobody measured it


def test_the_picture_marks_the_mean_and_the_worst_clients_of_the_table(study):
    runs, _ = report.read_runs(study)
    rows = report.comparison(runs)
    axes = report.clients_figure(runs).axes[0]
    drawn = [(float(statistics.fmean(line.get_xdata())), line.get_marker()) for line in axes.lines]
    for number, row in enumerate(rows):
        (mean, _), (worst, marker) = drawn[2 * number], drawn[2 * number + 1]
        assert (mean, worst) == pytest.approx((row["personalized"].mean, row["worst10"].mean)) and marker == "|"


def test_lines_that_coincide_share_a_short_name(study):
    runs, _ = report.read_runs(study)
    for figure in (report.depth_figure(runs), report.accuracy_figure(runs)):
        names = [text.get_text() for text in figure.axes[0].texts if not text.get_text().startswith(("stage ", "shared"))]
        lines = [line for name in names for line in name.split(",\n")]
        told = [line for line in lines if not line.endswith(" more")]
        more = sum(int(line.split()[0]) for line in lines if line.endswith(" more"))
        assert len(told) + more == len(METHODS) and "fedms" in told and all(name.count("\n") < 3 for name in names)


def test_accuracy_over_the_simulated_clock(tmp_path):
    for method, seconds in (("fedms", 100.0), ("local", 50.0)):
        write_run(tmp_path / method, method, rounds=(3, 2), round_seconds=seconds)
    runs, _ = report.read_runs(tmp_path)
    axes = report.clock_figure(runs).axes[0]
    lines = [[round(float(x), 9) for x in line.get_xdata()] for line in axes.lines]
    expected = {"fedms": [k * 100 / 60 for k in range(1, 6)], "local": [k * 50 / 60 for k in range(1, 6)]}
    for xs in expected.values():        # a piece for each stage
        assert [round(x, 9) for x in xs[:3]] in lines and [round(x, 9) for x in xs[3:]] in lines
    assert "simulated (min)" in axes.get_xlabel() and "seconds" in Page(report.render(runs)).inside("label")
    assert report.clock_figure([RunRecords.read(write_run(tmp_path / "plain"))]) is None


def test_a_page_needs_nothing_else(study):
    text = report.write_report(study).read_text(encoding="utf-8")
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "base"}
    assert the_only_script_may_run(text, page)
    assert 2000 < len(page.inside("script")[0]) < 4000 and "http" not in page.inside("script")[0]
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value.startswith("#"), (name, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*[\"']?([^)]*)", text))
    assert "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {a["xlink:href"][1:] for _, a in page.tags if "xlink:href" in a}
    assert wanted <= set(ids) and set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def the_only_script_may_run(text: str, page: Page) -> bool:
    """Its hash is the one that the page's own policy lets run, so nothing else does, whatever stands in the records."""
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return ([t for t, _ in page.tags].count("script") == 1
            and policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'")


def test_every_color_has_a_light_and_a_dark_value(study):
    text = report.write_report(study).read_text(encoding="utf-8")
    defined = dict(re.findall(r"(--[a-z0-9-]+): (light-dark\(#[0-9a-f]{6}, #[0-9a-f]{6}\)|var\(--[a-z0-9]+\));", text))
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", text)) - {"--font"}
    assert used <= set(defined) and {"--ink", "--muted", "--line", "--good"} <= used
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb, WCAG 2.2."""
    channels = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_every_text_can_be_read(study, theme):
    """Contrast of at least 4.5:1, of each color of a text on every surface that it stands on."""
    text = report.write_report(study).read_text(encoding="utf-8")
    colors = {name: pair[theme] for name, *pair in re.findall(r"--([a-z0-9-]+): light-dark\((#\w{6}), (#\w{6})\)", text)}
    colors |= {name: colors[other] for name, other in re.findall(r"--([a-z]+): var\(--(c\w+)\)", text)}
    backgrounds = ("page", "surface", "good-bg", "bad-bg", "tint")
    inks = set(colors) - {*backgrounds, "line", "edge", "cffffff", "ce4e7ec"}
    assert len(inks) > 15
    for ink in inks:
        for behind in backgrounds if ink in ("ink", "muted") else ("surface",):
            light, dark = sorted((luminance(colors[ink]), luminance(colors[behind])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, behind)


def test_the_page_can_be_read_aloud(study):
    """Tables have captions and headers, charts have descriptions, what scrolls can be reached by the keyboard."""
    page = page_of(study)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("caption") == tags.count("table") > 10 and tags.count("main") == 1
    assert all(a.get("scope") in ("col", "row") for t, a in page.tags if t == "th")
    charts = [a for t, a in page.tags if t == "div" and a.get("role") == "img"]
    assert len(charts) == tags.count("svg") and all(len(a["aria-label"]) > 30 for a in charts)
    assert all(a.get("tabindex") == "0" and a["aria-label"] for t, a in page.tags if a.get("class") == "scroll")


def test_the_best_of_each_column_is_marked(study):
    rows = report.comparison(report.read_runs(study)[0])
    header, cells = marked_table(rows)
    for key, title, best in (("personalized", "personalized %", max), ("below_local", "better off alone %", min)):
        column = [line[header.index(title)] for line in cells]
        means = [row[key].mean if row.get(key) else None for row in rows]
        assert [cell.value for cell in column] == means
        assert column[means.index(best(m for m in means if m is not None))].best
    assert not any(line[header.index("time")].best for line in cells)


def test_methods_and_clients_have_their_classes(study):
    """So that the page can show one of them alone."""
    classes = {name for _, a in page_of(study).tags for name in (a.get("class") or "").split()}
    assert {f"of-{m}" for m in METHODS} | {f"client-{c}" for c in range(12)} <= classes


def test_what_made_a_run_is_told(tmp_path):
    folder = write_run(tmp_path / "run")
    assert "was not recorded" in page_of(folder).visible
    (folder / "provenance.jsonl").write_text(json.dumps(provenance()) + "\n")
    page = page_of(folder)
    assert importlib.metadata.version("torch") in page.visible and "fedms, seed 0: FedMS" in page.visible
    assert page.inside("pre")[0] == provenance()["command"]


def test_equal_records_give_an_equal_page(tmp_path, monkeypatch):
    import matplotlib

    first = report.write_report(write_run(tmp_path / "a" / "run")).read_bytes()
    matplotlib.rcParams["lines.linewidth"] = 9  # a setting of the user
    try:
        again = report.write_report(write_run(tmp_path / "b" / "run")).read_bytes()
        assert again == first
        assert matplotlib.rcParams["lines.linewidth"] == 9
    finally:
        matplotlib.rcdefaults()


EVIL = '<script>alert("1")</script><img src=http://x.example>&amp;$x_$'


def test_texts_of_others_are_escaped(tmp_path):
    for method in ("local", "fedms"):
        path = write_run(tmp_path / f"{method}-seed0", method)
        edit(path / "clients.jsonl", lambda c: {**c, "group": EVIL})
        edit(path / "rounds.jsonl", lambda r: {**r, "event": EVIL})
        edit(path / "visits.jsonl", lambda v: {**v, "status": "failed", "reason": EVIL})
        edit(path / "summary.json", lambda s: {**s, "notes": [EVIL]})
        config = (path / "config.toml").read_text()
        (path / "config.toml").write_text(config.replace("[data]\n", f"[data]\npath = '{EVIL}'\n"))
    (tmp_path / f"x{EVIL.replace('/', '')}").mkdir()
    (tmp_path / f"x{EVIL.replace('/', '')}" / "config.toml").write_text("no toml")
    page = page_of(tmp_path)
    assert the_only_script_may_run((tmp_path / "report.html").read_text(encoding="utf-8"), page)
    assert "img" not in {tag for tag, _ in page.tags}
    for tag in ("text", "td", "pre", "li"):  # pictures, tables, configuration, findings show it as it is
        assert any(EVIL in text for text in page.inside(tag)), tag


# Unfinished, damaged, unequal

def test_a_run_that_has_not_ended(tmp_path):
    path = write_run(tmp_path / "run", stop_after=5)
    page = page_of(path)
    assert "No run here has ended" in page.visible
    assert finding(path, "has not ended: the last round recorded is stage 1, round 5")["kind"] == "bad"
    assert page.inside("h3") == ["On validation samples"]         # the depth is the same in all five rounds
    assert not page.inside("dd")


def test_a_run_killed_before_its_first_round_ended(tmp_path):
    path = write_run(tmp_path / "run", stop_after=0)
    assert page_of(path).inside("h3") == []
    assert finding(path, "no round was completed, 0 visits are recorded")


def test_an_unfinished_run_beside_others_does_not_count(tmp_path):
    write_run(tmp_path / "a", "fedavg")
    write_run(tmp_path / "b", "fedms")
    write_run(tmp_path / "c", "fedms", 1, stop_after=9)
    rows = {row["method"]: row for row in report.comparison(report.read_runs(tmp_path)[0])}
    assert (rows["fedms"]["seeds"], rows["fedms"]["unfinished"]) == (1, 1)
    assert rows["fedms"]["personalized"].std is None
    assert "fedms (1 unfinished)" in page_of(tmp_path).inside("th")


def test_damage_is_named_and_does_not_hide_the_other_runs(tmp_path):
    write_run(tmp_path / "a", "fedavg")
    write_run(tmp_path / "b", "fedms")
    bad = write_run(tmp_path / "c", "local")
    (bad / "rounds.jsonl").write_text("{\n{}\n")
    cut = (tmp_path / "b" / "visits.jsonl").read_bytes()
    (tmp_path / "b" / "visits.jsonl").write_bytes(cut[:-9])
    assert finding(tmp_path, "rounds.jsonl, line 1: not a record")["kind"] == "bad"
    assert finding(tmp_path, "b: visits.jsonl: its last line is cut off")["kind"] == "bad"
    assert "local" not in page_of(tmp_path).inside("th")
    with pytest.raises(RunFolderError, match="line 1"):
        report.write_report(bad)


def test_no_runs(tmp_path):
    with pytest.raises(RunFolderError, match="holds no run"):
        report.write_report(tmp_path)


def test_failed_visits_are_counted_with_their_reason(tmp_path):
    path = write_run(tmp_path / "run")
    edit(path / "visits.jsonl", lambda v: {**v, "status": "failed", "reason": "diverged"} if v["client"] == 3 else v)
    assert finding(path, "12 of 144 visits did not train (diverged)")["kind"] == "bad"


def test_runs_of_other_settings_are_not_compared_silently(tmp_path):
    write_run(tmp_path / "a", "fedavg")
    write_run(tmp_path / "b", "fedms", rounds=(9, 4))
    assert finding(tmp_path, "differ in more than method and seed: stage1.rounds")["kind"] == "bad"


def test_a_client_without_test_samples(tmp_path):
    path = write_run(tmp_path / "run")
    edit(path / "clients.jsonl", lambda c: {**c, "n_test": 0, "accuracy": dict.fromkeys(c["accuracy"]),
                                            "macro_f1": None, "gate_mean": None, "gate_std": None,
                                            "gate_entropy": None} if c["id"] == 2 else c)
    assert page_of(path).inside("td").count("–") >= 6


# Words

def test_a_headline_of_three_seeds_tells_gaps_from_noise(study):
    runs, _ = report.read_runs(study)
    text = report.headline(runs)
    ours = [r.summary["personalized_accuracy"]["mean"] for r in runs if r.method == "fedms"]
    assert text.startswith(f"No difference shown: with fedms, best of 5 methods, clients answer {100 * statistics.fmean(ours):.1f} ± "
                           f"{100 * statistics.stdev(ours):.1f} % of their own test data right on average; fedavg_ft is 2nd with")
    points = re.fullmatch(r".* over 3 seeds\)\. In points, fedms is (.*)\.", text)[1]
    parts = dict(re.fullmatch("(not clearly apart from|ahead of) (.*)", part).groups() for part in points.split("; "))
    for method in METHODS[:-1]:
        theirs = [r.summary["personalized_accuracy"]["mean"] for r in runs if r.method == method]
        gaps = [a - b for a, b in zip(ours, theirs)]
        if abs(statistics.fmean(gaps)) > 4.30 * statistics.stdev(gaps) / 3**0.5:  # Student's t, two degrees of freedom
            assert f"{method} ({100 * statistics.fmean(gaps):+.1f})" in parts["ahead of"]
        else:
            assert (f"{method} ({100 * statistics.fmean(gaps):+.1f} ± {100 * statistics.stdev(gaps):.1f})"
                    in parts["not clearly apart from"])
    assert report.ONE_SEED not in text


def test_a_headline_of_many_methods_is_short(tmp_path):
    for method, mean in {"local": 0.5, "fedavg": 0.62, "fedprox": 0.61, "fedper": 0.66, "fedrep": 0.70, "ditto": 0.65,
                         "apfl": 0.64, "feddpa": 0.58, "ffa_lora": 0.6, "fedms": 0.6}.items():
        with_accuracy(write_run(tmp_path / method, method), mean)
    assert report.headline(report.read_runs(tmp_path)[0]) == (
        "With fedrep, best of 10 methods, clients answer 70.0 % of their own test data right on average; fedms is 7th with 60.0 %, 10.0 "
        "points behind, which may be chance. In points, fedms is behind "
        "fedrep (−10.0), fedper (−6.0) and 4 more; level with ffa_lora; ahead of feddpa (+2.0) and local (+10.0). "
        + report.ONE_SEED)


def with_accuracy(path, mean):
    edit(path / "summary.json", lambda s: {**s, "personalized_accuracy": {"mean": mean, "std": 0.1, "worst10": 0.1}})


@pytest.mark.parametrize("ours, theirs, words", [
    ([0.70], [0.60], "ahead of local (+10.0). " + report.ONE_SEED),
    ([0.60], [0.70], "behind local (−10.0). " + report.ONE_SEED),
    ([0.60], [0.60], "level with local. " + report.ONE_SEED),
    ([0.60, 0.62, 0.61], [0.50, 0.50, 0.50], "ahead of local (+11.0)."),
    ([0.60, 0.62, 0.61], [0.62, 0.63, 0.63], "behind local (−1.7)."),  # 0.6 spread
    ([0.60, 0.62, 0.61], [0.62, 0.63, 0.61], "not clearly apart from local (−1.0 ± 1.0)."),
    ([0.60, 0.62], [0.50, 0.50], "not clearly apart from local (+11.0 ± 1.4)."),  # two seeds can hardly tell
    ([0.60, 0.62], [0.62, 0.60], "not clearly apart from local (+0.0 ± 2.8)."),
])
def test_headlines(tmp_path, ours, theirs, words):
    for method, values in (("fedms", ours), ("local", theirs)):
        for seed, value in enumerate(values):
            with_accuracy(write_run(tmp_path / f"{method}{seed}", method, seed), value)
    assert report.headline(report.read_runs(tmp_path)[0]).endswith(words)


def with_perplexity(path, nats, zero_shot=math.log(120)):
    """Give a run the records of a language model: `nats(client)` a token of each client, or the same number for all."""
    of_client = nats if callable(nats) else lambda client: nats
    found = []

    def change(client):
        found.append(of_client(client["id"]))
        return {**client, "language": {"nats": found[-1], "nats_zero_shot": zero_shot}}
    edit(path / "clients.jsonl", change)
    edit(path / "summary.json", lambda s: {**s, "language": {"nats": statistics.fmean(found), "nats_zero_shot": zero_shot}})


def test_language_models_are_compared_by_perplexity_however_their_accuracies_stand(tmp_path):
    for method, of_seeds, accuracy in (("fedms", (3.90, 3.91, 3.92), 0.3), ("local", (4.00, 4.02, 4.01), 0.4)):
        for seed, nats in enumerate(of_seeds):
            path = write_run(tmp_path / f"{method}{seed}", method, seed)
            with_accuracy(path, accuracy)
            with_perplexity(path, nats)
    change, half = math.expm1(-0.1), 4.303 * 0.01 / 3**0.5       # of 0.10, 0.11 and 0.09 nats
    assert report.headline(report.read_runs(tmp_path)[0]) == (
        f"With fedms, best of 2 methods, the answers in clients' own test data have a perplexity of {math.exp(3.91):.1f}; local is 2nd "
        f"with {math.exp(4.01):.1f}, more than chance explains. The perplexity of fedms is {-100 * change:.1f} % below that of local "
        f"(95 % interval −{-100 * math.expm1(-0.1 - half):.1f} % to −{-100 * math.expm1(-0.1 + half):.1f} % over 3 seeds). "
        "Before training it is 120.0. In perplexity, fedms is ahead of local (−9.5 %).")


@pytest.fixture
def language_models(tmp_path):
    """Two methods, two seeds, four clients: fedms is ahead for client 0 alone by perplexity, and for all of them by accuracy."""
    for method in ("fedms", "local"):
        for seed in range(2):
            path = write_run(tmp_path / f"{method}{seed}", method, seed, clients=4, unseen=0)
            edit(path / "clients.jsonl", lambda c: {**c, "accuracy": {**c["accuracy"], "personalized": 0.9 if method == "fedms" else 0.1}})
            with_perplexity(path, lambda client: 4.0 + 0.1 * client + (method == "fedms") * (0.2 if client else -0.1))
    return tmp_path


def test_a_client_of_a_language_model_is_better_off_alone_where_its_perplexity_says_so(language_models):
    rows = {row["method"]: row for row in report.comparison(report.read_runs(language_models)[0])}
    assert rows["fedms"]["below_local"].mean == 0.75 and rows["fedms"]["perplexity"].mean == pytest.approx(math.exp(4.275))


def test_charts_of_language_models_show_perplexities(language_models):
    runs, _ = report.read_runs(language_models)
    gain = report.gain_figure(runs).axes[0]
    assert "perplexity" in gain.get_xlabel() and gain.get_title(loc="left") == "better for 1 of 4, worse for 3"
    steps = [line.get_xdata() for line in gain.lines if len(line.get_xdata()) == 2]
    assert [float(x) for x in steps[0]] == pytest.approx([math.exp(4.0), math.exp(3.9)])      # the largest gain first
    assert [float(x) for x in steps[-1]] == pytest.approx([math.exp(4.3), math.exp(4.5)])
    clients, gaps, cost = (draw(runs).axes[0] for draw in (report.clients_figure, report.gaps_figure, accuracy_by_bytes_figure))
    means = [float(line.get_xdata()[0]) for line in clients.lines[::2]]
    assert means == pytest.approx([120.0, math.exp(4.15), math.exp(4.275)]) and clients.get_xlabel() == cost.get_ylabel()
    assert [float(line.get_xdata()[0]) for line in gaps.lines[2:]] == pytest.approx([100 * math.expm1(-0.125)])
    drawn = [float(line.get_ydata()[0]) for line in cost.lines[1:]]
    assert drawn == pytest.approx([math.exp(4.15), math.exp(4.275)])
    assert "loss" in report.accuracy_figure(runs).axes[0].get_ylabel()


def test_a_page_about_language_models_speaks_of_perplexity(language_models):
    page = page_of(language_models)
    texts = [text for _, text in page.texts]
    row = next(i for i, text in enumerate(texts) if text == "local" and texts[i + 1] == "+13.3 %")
    assert texts[row + 2:row + 6] == ["+13.3 % to +13.3 %", "worse", "2 of 8", "6"]       # the seeds agree
    assert f"On its worst 10 % of clients fedms has a perplexity of {math.exp(4.5):.1f}." in page.inside("li")
    assert "whose perplexity is higher than in the run of local" in page.visible
    cells = [text for path, text in page.texts if "td" in path]
    assert f"{math.exp(3.9):.1f}" in cells and f"{math.exp(4.3):.1f}" in cells
    assert "validation loss" in page.inside("th") and "validation accuracy %" not in page.inside("th")
    assert "linear head" not in page.visible
    _, text = report.write_comparison(language_models)
    assert "| local | +13.3 % |" in text.read_text(encoding="utf-8")


def test_a_language_model_alone_is_compared_with_itself_by_perplexity(tmp_path):
    path = write_run(tmp_path / "run", "fedms")
    with_accuracy(path, 0.5)
    with_perplexity(path, 4.0, zero_shot=4.5)
    assert report.headline(report.read_runs(tmp_path)[0]) == (
        f"fedms reaches a perplexity of {math.exp(4):.1f}, 39.3 % below zero-shot; 50.0 % of the tokens are the most probable ones. "
        + report.ONE_SEED)


def test_seeds_that_are_not_shared_give_no_spread(tmp_path):
    with_accuracy(write_run(tmp_path / "a", "fedms", 0), 0.7)
    with_accuracy(write_run(tmp_path / "b", "local", 1), 0.6)
    assert report.headline(report.read_runs(tmp_path)[0]).endswith("ahead of local (+10.0). " + report.ONE_SEED)


def test_a_collapsed_gate_is_named(tmp_path):
    assert "collapsed onto the local expert: 97 % local on average" in finding(
        write_run(tmp_path / "one", collapsed=True), "gate collapsed")["text"]
    write_run(tmp_path / "many" / "a", collapsed=True)
    write_run(tmp_path / "many" / "b", seed=1)
    found = finding(tmp_path / "many", "gate collapsed")
    assert "in 1 of 2 seeds" in found["text"] and found["kind"] == "bad"
    edit(tmp_path / "one" / "summary.json", lambda s: {**s, "gate": {**s["gate"], "mean": 0.02}})
    assert finding(tmp_path / "one", "collapsed onto the global expert")


def test_a_gate_that_is_a_constant_is_not_praised(tmp_path):
    path = write_run(tmp_path / "run")
    assert finding(path, "The gate still mixes: 60 % local on average")["kind"] == "good"
    edit(path / "summary.json", lambda s: {**s, "gate": {**s["gate"], "std_clients": 0.001, "std_samples": 0.004}})
    assert finding(path, "The gate acts as one constant weight")["kind"] == "plain"


@pytest.mark.parametrize("gains, words, kind", [
    ([0.02], "the learned gate 2.0 points more (one seed, so no spread", "plain"),
    ([-0.02], "the learned gate 2.0 points less (one seed, so no spread", "plain"),
    ([0.0], "the learned gate the same.", "plain"),
    ([0.02, 0.03, 0.02], "the learned gate +2.3 ± 0.6 points, clearly different over 3 seeds", "good"),
    ([-0.02, -0.03, -0.02], "the learned gate −2.3 ± 0.6 points, clearly different over 3 seeds", "bad"),
    ([0.02, -0.01, 0.02], "the learned gate +1.0 ± 1.7 points, not clearly different over 3 seeds", "plain"),
])
def test_the_gate_against_a_fixed_mix_is_judged_by_the_spread(tmp_path, gains, words, kind):
    for seed, gain in enumerate(gains):
        path = write_run(tmp_path / f"s{seed}", seed=seed)
        edit(path / "clients.jsonl", lambda c, gain=gain: {
            **c, "accuracy": {**c["accuracy"], "mixture": 0.6, "half": 0.6 - gain, "oracle": None}})
    found = finding(tmp_path, "A fixed half-and-half mix")
    assert words in found["text"] and found["kind"] == kind


@pytest.mark.parametrize("method", ["local", "fedavg"])
def test_a_method_without_a_gate(tmp_path, method):
    path = write_run(tmp_path / "run", method)
    assert not [f for f in findings(path) if "gate" in f["text"]]
    assert "How each client mixes the experts" not in page_of(path).inside("h3")
    assert "its own global expert" not in report.headline(report.read_runs(path)[0])


def test_notes_name_their_seeds_unless_all_have_them(tmp_path):
    for seed in range(3):
        path = write_run(tmp_path / f"{seed}", seed=seed)
        own = ["one class is missing", "the last one"][:1 + (seed == 2)] if seed else []
        edit(path / "summary.json", lambda s: {**s, "notes": ["two are missing", *own]})
    assert finding(tmp_path / "0", "missing")["text"] == "Two are missing."
    assert [f["text"] for f in findings(tmp_path) if "missing" in f["text"] or "last one" in f["text"]] == [
        "Two are missing.", "Seeds 1, 2: one class is missing.", "Seed 2: the last one."]


# Tables

def test_the_comparison_files(study):
    table, text = report.write_comparison(study)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["seed"]) for r in rows] == [(m, str(s)) for m in METHODS for s in range(3)]
    for row in rows:
        summary = RunRecords.read(study / f"{row['method']}-seed{row['seed']}").summary
        assert float(row["personalized_mean"]) == summary["personalized_accuracy"]["mean"]
        assert int(row["bytes_up"]) == summary["bytes_up"]
        assert row["gate_collapsed"] == ("False" if row["method"] == "fedms" else "")
    lines = text.read_text(encoding="utf-8").splitlines()
    assert lines[8] == "" and len({line.count("|") for line in lines[:8]}) == 1
    tests = lines[lines.index("| against | points | 95 % interval by seed | shown | clients better | worse | p | p corrected |") + 2:]
    assert [line.split()[1] for line in tests] == [m for m in METHODS if m != "fedms"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_table_fits_the_terminal_and_keeps_what_matters(study, width):
    rows = report.comparison(report.read_runs(study)[0])
    header, cells = report.table(rows, width=width)
    widths = [max(len(part) for text in column for part in text.split("\n")) for column in zip(header, *cells)]
    assert sum(widths) + 2 * (len(widths) - 1) <= width
    assert "mean\nacc. %" in header and (width < 60 or "worst 10 %\nacc. %" in header)
    assert len(report.table(rows, width=1000)[0]) == len(report.table(rows)[0]) == 14


@pytest.mark.parametrize("value, text", [(None, "–"), (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"),
                                         (65_700_000, "65.7 MB"), (3e12, "3 TB")])
def test_sizes(value, text):
    assert report.size(value) == text


@pytest.mark.parametrize("value, text", [(None, "–"), (0.04, "0.0 s"), (59.9, "59.9 s"), (59.96, "1 min 00 s"),
                                         (123.4, "2 min 03 s"), (3599.9, "1 h 00 min"), (7322, "2 h 02 min")])
def test_durations(value, text):
    assert report.duration(value) == text


def test_worst_tenth():
    assert report.worst_tenth([0.5, 0.1, 0.9]) == 0.1
    assert report.worst_tenth([i / 20 for i in range(20)]) == pytest.approx(0.025)
    assert report.worst_tenth([i / 21 for i in range(21)]) == pytest.approx(1 / 21)  # rounded up to three


def texts_of(folder) -> str:
    return " ".join(each["text"] for each in report.findings(*report.read_runs(folder)))


def test_a_fixed_weight_is_no_gate(tmp_path):
    """Neither learned nor collapsed, whatever an older version wrote into the summary."""
    said = texts_of(write_run(tmp_path, collapsed=True, sets=("gate.weight=1.0",)))
    assert "No gate was trained; the weight of the local expert is 97 % on average." in said
    assert "collapsed" not in said and "learned gate" not in said


@pytest.mark.parametrize("keep, told", [("best", True), ("last", False)])
def test_visits_that_were_undone_are_told(tmp_path, keep, told):
    folder = write_run(tmp_path, sets=(f"stage2.keep={keep}",))
    lines = [json.loads(line) for line in (folder / "visits.jsonl").read_text().splitlines()]
    for line in lines:
        if line["stage"] == "stage2" and line["client"] < 6:
            line["validation_loss"] = 0.5
    (folder / "visits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ("validation loss were undone (stage2.keep = \"best\"): 18 of 48 with fedms, seed " in texts_of(folder)) == told


def test_visits_that_improve_are_no_finding(tmp_path):
    assert "were undone" not in texts_of(write_run(tmp_path))


def test_a_thousand_reasons_are_one_short_line(tmp_path):
    folder = write_run(tmp_path)
    lines = [json.loads(line) for line in (folder / "visits.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line.update(status="failed", reason=f"reason {number}")
    (folder / "visits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert all(len(each["text"]) < 500 for each in report.findings(*report.read_runs(folder)))


def test_a_report_speaks_of_the_recommended_method_first():
    from fedms.config import registry
    from fedms.report.numbers import focus_method

    assert registry.RECOMMENDED in registry.methods()
    assert focus_method(["local", "fedms", registry.RECOMMENDED, "apfl"]) == registry.RECOMMENDED
    assert focus_method(["local", "fedms", "apfl"]) == "fedms" and focus_method(["local", "apfl"]) == "apfl"
