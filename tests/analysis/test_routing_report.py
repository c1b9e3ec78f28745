"""The routing report: what is collected is what the routers chose, and the page shows it."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from ldmole_ds.analysis import Prompt, collect_routing, render_page, summarise
from ldmole_ds.analysis.names import grid_of
from ldmole_ds.analysis.source import file_prompts, task_prompts
from ldmole_ds.model import get_ldmole_model
from ldmole_ds.tasks import demo_files
from tests.browser import MISSING, find_browser, open_page
from tests.tiny import tiny_config, tiny_model

LENGTHS = (5, 9, 2, 7)
HOSTILE = ("a", "</script>", "<b>", "\n", "\u2028", "{{DATA}}", "'\"&")


def some_prompts():
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 9, (n,), generator=generator).tolist() for n in LENGTHS]
    return [Prompt(tuple(row), tuple(HOSTILE[i % len(HOSTILE)] for i in row)) for row in rows]


@pytest.fixture(scope="module")
def collected():
    model, prompts = tiny_model(tiny_config(num_experts=6)).eval(), some_prompts()
    return model, prompts, collect_routing(model, prompts, batch_size=3)


def records_of(model, prompt):
    """The routing of one prompt alone, without padding, as it reaches the experts."""
    found = {}
    dispatchers = {group.dispatcher for group in model.input_groups}

    def keep(run):
        def watched(x_TD, probs_TGE, experts, layer):
            found[layer] = probs_TGE
            return run(x_TD, probs_TGE, experts, layer)

        return watched

    for dispatcher in dispatchers:
        dispatcher.run = keep(dispatcher.run)
    with torch.no_grad():
        model(input_ids=torch.tensor([prompt.ids]))
    for dispatcher in dispatchers:
        del dispatcher.run
    return torch.cat([(found[group.name] > 0) for group in model.input_groups], 1)


def test_what_no_prompt_reaches_is_left_out():
    """Mamba's mixer reads dt_proj's weight by itself."""
    base = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4))
    model = get_ldmole_model(base, tiny_config()).eval()
    routing = collect_routing(model, some_prompts())
    assert len(routing.projections) == 6 and not any("dt_proj" in name for name in routing.projections)
    assert routing.counts_TJ.shape == (sum(LENGTHS), 6) and len(routing.load_JE) == 6
    assert sorted(sum(routing.groups, [])) == list(range(6))


def test_collected_is_what_every_prompt_does_alone(collected):
    model, prompts, routing = collected
    active = torch.cat([records_of(model, prompt) for prompt in prompts])
    assert routing.counts_TJ.tolist() == active.sum(-1).tolist()
    assert [load.tolist() for load in routing.load_JE] == active.sum(0).tolist()
    assert routing.projections == [member for group in model.input_groups for member in group.members]
    assert routing.lam_TN.shape == (sum(LENGTHS), len(model.input_groups)) and routing.lam_TN.std(0).min() > 0
    assert model.routing.summary() != {}  # the model's own statistics are back in their place


def test_numbers_of_the_page(collected):
    model, prompts, routing = collected
    data = summarise(routing, prompts, shown=2)
    totals, summary = data["totals"], model.routing.means()
    assert totals["tokens"] == sum(LENGTHS) and totals["all_experts"] == 14 * 6
    assert totals["experts_per_token"] == pytest.approx(summary["experts_per_token"], abs=1e-3)
    assert totals["lambda_std"] == pytest.approx(summary["lambda_std"], abs=1e-3)
    assert totals["max_load"] == pytest.approx(summary["max_load"], abs=1e-3)
    assert totals["dead_experts"] == summary["dead_experts"] > 0
    for j, counts in enumerate(data["histograms"]):
        assert counts == [(routing.counts_TJ[:, j] == k).sum() for k in range(7)]
        assert np.mean(data["loads"][j]) == pytest.approx(1, abs=1e-3)
    assert len(data["prompts"]) == 2 and data["prompts"][1]["tokens"] == list(prompts[1].tokens)
    unpacked = np.frombuffer(base64.b64decode(data["prompts"][1]["counts"]), "<u2").reshape(LENGTHS[1], 14)
    assert (unpacked == routing.counts_TJ[LENGTHS[0] : LENGTHS[0] + LENGTHS[1]]).all()
    lines = {line["label"]: line["points"] for line in data["lambda"]}
    assert list(lines) == ["q_proj, k_proj, v_proj", "o_proj", "gate_proj, up_proj", "down_proj"]
    assert [point["layer"] for point in lines["o_proj"]] == [0, 1]
    assert lines["o_proj"][1]["mean"] == pytest.approx(float(routing.lam_TN[:, 5].mean()), abs=1e-3)
    json.dumps(data)


def test_tokens_are_ranked_over_their_occurrences():
    model, ids = tiny_model().eval(), list(range(30))
    prompts = [Prompt((*ids, 7), tuple(f" t{i}" for i in (*ids, 7)))]
    routing = collect_routing(model, prompts)
    table = summarise(routing, prompts)["tokens"]
    means = routing.counts_TJ.mean(1)
    by_token = {f" t{i}": means[i] for i in ids} | {" t7": (means[7] + means[30]) / 2}
    ranked = sorted(by_token, key=lambda token: -by_token[token])
    assert [row["mean"] for row in table["most"]] == [pytest.approx(by_token[t], abs=1e-3) for t in ranked[:12]]
    assert [row["mean"] for row in table["fewest"]] == [pytest.approx(by_token[t], abs=1e-3) for t in ranked[::-1][:12]]
    row = next(row for row in table["most"] + table["fewest"] if row["token"] == " t10")
    assert row["before"].endswith(" t8 t9") and row["after"].startswith(" t11 t12") and row["occurrences"] == 1


def test_projections_find_their_layer_and_kind():
    llama = grid_of([f"model.layers.{i}.{p}" for i in (0, 1, 10) for p in ("self_attn.q_proj", "mlp.up_proj")])
    assert llama.layers == ["0", "1", "10"] and llama.kinds == ["q_proj", "up_proj"] and llama.places[-1] == (2, 1)
    gpt = grid_of([f"transformer.h.0.{p}" for p in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")])
    assert gpt.kinds == ["attn.c_attn", "attn.c_proj", "mlp.c_proj"]
    other = grid_of(["vision.blocks.0.fc", "text.blocks.0.fc", "merger.proj"])
    assert other.layers == ["vision.blocks.0", "text.blocks.0", "-"] and other.places == [(0, 0), (1, 0), (2, 1)]


def test_prompts_of_a_task_and_of_a_file(tmp_path):
    assert len(task_prompts("clinc_domains", limit=3)) == 3
    first = json.loads(demo_files()["test"].read_text().splitlines()[0])["text"]
    assert first.strip() in task_prompts("clinc_domains", limit=1)[0]
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffone\n\n two \n", encoding="utf-8")
    assert file_prompts(path) == ["one", "two"]
    path.write_text("\n")
    with pytest.raises(ValueError, match="one prompt in each line"):
        file_prompts(path)


def test_plain_lora_has_no_routing():
    plain = tiny_model(tiny_config(router="lora")).eval()
    with pytest.raises(ValueError, match="no routing to report"):
        collect_routing(plain, some_prompts())


# ---- the page ----


def test_the_page_asks_for_nothing_and_keeps_its_data(collected):
    _, prompts, routing = collected
    data = summarise(routing, prompts)
    page = render_page(data, {"base <model>": "a & b"}, "<i>run</i>")
    assert "<h1>&lt;i&gt;run&lt;/i&gt;</h1>" in page and "base &lt;model&gt;" in page
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert json.loads(text) == json.loads(json.dumps(data))
    assert page.count("</script>") == 2 and "</html>" in page
    addresses = re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", page.replace(text, ""))
    assert addresses == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"@import|url\(|<img|<link(?! rel=\"icon\" href=\"data:,\")|fetch\(|XMLHttpRequest", page)


LOOK = """
const colours = (canvas) => {
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [canvas.width, canvas.height];
  const pen = copy.getContext("2d", { willReadFrequently: true });
  pen.drawImage(canvas, 0, 0);
  return new Set(new Uint32Array(pen.getImageData(0, 0, copy.width, copy.height).data.buffer)).size;
};
const facts = () => ({
  cells: document.querySelectorAll("#heatmap rect.cell").length,
  histogram: document.querySelectorAll("#histogram rect.bar").length,
  load: document.querySelectorAll("#load rect.bar").length,
  lambda: document.querySelectorAll("#lambda svg").length,
  tokens: document.querySelectorAll("#prompt-text span").length,
  rows: document.querySelectorAll("#most tbody tr, #fewest tbody tr").length,
  cards: document.querySelectorAll("#cards .card").length,
  selected: document.getElementById("selected").textContent,
  note: document.getElementById("load-note").textContent,
  tip: document.querySelector("#prompt-text span").dataset.tip,
  colours: new Set([...document.querySelectorAll("#prompt-text span")].map((s) => s.style.background)).size,
  panel: getComputedStyle(document.querySelector(".panel")).backgroundColor,
  drawn: colours(document.querySelector("#loads canvas")),
});
const found = [facts()];
document.querySelectorAll("#heatmap rect.cell")[3].dispatchEvent(new MouseEvent("click", { bubbles: true }));
found.push(facts());
document.getElementById("prompt").value = 1;
document.getElementById("prompt").dispatchEvent(new Event("change"));
document.querySelector("#prompt-text span").dispatchEvent(new MouseEvent("mousemove", { bubbles: true }));
found.push({ ...facts(), hover: document.getElementById("tip").textContent });
const out = Object.assign(document.createElement("pre"), { id: "found", textContent: JSON.stringify(found) });
document.body.append(out);
"""


def look(page, **options):
    document, console = open_page(page, LOOK, **options)
    assert console == []
    text = re.search(r'<pre id="found">(.*?)</pre>', document, re.S).group(1)
    return json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.skipif(find_browser() is None, reason=MISSING)
def test_a_browser_shows_every_plot_without_an_error(collected, tmp_path):
    _, prompts, routing = collected
    page = tmp_path / "report.html"
    page.write_text(render_page(summarise(routing, prompts), {"router": "sparsegen"}, "run"), encoding="utf-8")
    first, chosen, hovered = look(page)
    assert first["cells"] == 14 and first["load"] == 6 and first["histogram"] in (6, 7) and first["lambda"] == 4
    assert first["tokens"] == LENGTHS[0] and first["rows"] >= 8 and first["cards"] == 5
    assert first["drawn"] > 5 and first["colours"] > 1
    assert first["selected"] == "14 of 14 projections" and "busiest" in first["note"]
    # The fourth cell is o_proj of layer 0: everything follows it, by the numbers that were collected.
    assert chosen["selected"] == routing.projections[3] and "busiest" not in chosen["note"]
    assert f"{routing.counts_TJ[0, 3]:.2f} of 6 experts" in chosen["tip"]
    assert f"lambda {routing.lam_TN[0, 1]:.2f}" in chosen["tip"]
    assert hovered["tokens"] == LENGTHS[1] and hovered["hover"] == hovered["tip"]
    assert f"{routing.counts_TJ[LENGTHS[0], 3]:.2f} of 6 experts" in hovered["tip"]


@pytest.mark.skipif(find_browser() is None, reason=MISSING)
def test_a_browser_shows_other_routers_in_the_dark(tmp_path):
    """No lambda, expert counts that differ by layer, one short prompt."""
    model = tiny_model(tiny_config(router="topk", experts_per_layer=[2, 6])).eval()
    prompts = some_prompts()[2:3]
    page = tmp_path / "report.html"
    page.write_text(render_page(summarise(collect_routing(model, prompts), prompts), {}, "run"), encoding="utf-8")
    first, *_ = look(page, dark=True)
    assert first["lambda"] == 0 and first["cells"] == 14 and first["cards"] == 4
    red = int(re.findall(r"\d+", first["panel"])[0])
    assert red < 60  # the panel is dark
