"""The sections of a study's report, each as Markdown; one that has nothing to show yet is empty."""

from __future__ import annotations

from depthprune.evaluation.domains import HEADLINE_DOCUMENTS, HEADLINE_TOKENS, RESAMPLES, Interval
from depthprune.figures import curve_label
from depthprune.report.findings import findings, interval_text, not_converged, signed
from depthprune.report.markdown import escaped, origin_text, table
from depthprune.report.results import (
    NONE,
    UNPRUNED,
    StudyResults,
    capital,
    variant_label,
)
from depthprune.sites import PLURALS

FIRST = 10  # how many sites of each order are listed
ABSENT = "–"

DEFINITIONS = f"""\
- **Loss** is the mean of nats per predicted token on test text, **perplexity** is `exp` of it, and **bits per byte** is
  the loss in bits per UTF-8 byte.
- **Damage** is the loss of `none` minus the loss of the unpruned model. **Recovery** is the share of the damage that
  came back: (loss of `none` minus loss with the replacement) / damage. It is {ABSENT} where the damage is within noise.
- **Differences** are paired by document; `[low, high]` is their 95% bootstrap interval over documents ({RESAMPLES:,}
  resamples). **Beats** means that the interval excludes 0; such differences are **bold**. **Within noise** means that
  it does not.
- **Regression** of a domain is its loss minus that at the start of training. **Forgetting** is its loss minus the
  lowest loss that it had at any step so far, the start included.
- **Overfitting** is the change of the in-domain held-out loss minus the change of the loss on training documents, both
  since the start of training. It is shown at the last step, without an interval.
- **The control** of a trained replacement is the same training on the unpruned model; only what goes beyond it is
  recovery. None was run, so the shares of trained replacements are upper bounds.
"""


def warnings_section(results: StudyResults) -> str:
    """What a reader has to know before any figure: an unfinished study, a quick run."""
    notes = []
    missing = results.missing()
    if missing:
        notes.append(f"> **Unfinished study.** Still missing: {'; '.join(map(escaped, missing))}.")
    quick = results.quick_domains()
    if quick:
        notes.append(
            f"> **Quick run:** fewer than {HEADLINE_DOCUMENTS} test documents or {HEADLINE_TOKENS // 1000}k tokens "
            f"({'; '.join(map(escaped, quick))}). Verdicts are provisional: intervals over few documents are rough."
        )
    return "\n\n".join(notes)


def findings_section(results: StudyResults) -> str:
    """Every finding with its verdict and evidence."""
    lines = ["The claims are those of arXiv 2407.16286 and of first measurements at this size."]
    for finding in findings(results):
        lines.append(f"- **{capital(finding.verdict)}:** {escaped(finding.claim)}")
        lines += [f"  - {escaped(line)}" for line in finding.evidence]
    return "\n".join([lines[0], "", *lines[1:]])


def setup_section(results: StudyResults) -> str:
    """The model, the texts and their roles."""
    study = results.study
    model, texts = study.get("model") or {}, study.get("texts") or {}
    lines = []
    if model:
        architecture = model.get("architecture", {})
        note = f" ({escaped(model['note'])})" if model.get("note") else ""
        lines.append(
            f"- **Model:** {escaped(model.get('name'))}{note}, {escaped(architecture.get('model_type'))}, "
            f"{architecture.get('num_hidden_layers')} blocks, {model.get('parameters', 0):,} parameters; "
            f"sequences {'start' if model.get('bos') else 'do not start'} with BOS."
        )
    if texts:
        text = escaped(texts.get("text"))
        scored, fitted = (f"{texts.get(name, 0):,} tokens of {text}" for name in ("score_tokens", "calibration_tokens"))
        lines += [
            f"- **Sequences:** {texts.get('sequence_length')} tokens.",
            f"- **Text roles,** kept apart by groups of documents: *score* (influence) {scored}; *fit* {fitted} for "
            "the emulated update, and the training tokens below; *tune* for the training curves; *test* for the losses "
            "in the tables.",
        ]
    if results.influence is not None:
        denominator = results.influence.provenance.get("denominator")
        words = {"output": "stream after the site (output)", "input": "stream before the site (input)"}
        lines.append(
            f"- **Relative metrics** divide by the {words.get(str(denominator), 'stream (side not recorded)')}."
        )
    chosen = {
        str(entry["plan"]["provenance"]["metric"])
        for entry in study.get("plans", {}).values()
        if "metric" in entry["plan"].get("provenance", {})
    }
    if chosen:
        lines.append(f"- **Plans** remove the sites of lowest influence by {escaped(', '.join(sorted(chosen)))}.")
    rows = []
    for domain in results.domains:
        loss = results.loss(UNPRUNED, domain)
        if loss is not None:
            counts = [f"{loss.documents:,}", f"{int(loss.tokens.sum()):,}"]
            measures = [f"{loss.loss:.3f}", f"{loss.perplexity:.2f}", f"{loss.bits_per_byte:.3f}"]
            rows.append([escaped(domain), results.role(domain), *counts, *measures])
    if rows:
        header = ["Domain", "Role", "Test documents", "Test tokens", "Unpruned loss", "Perplexity", "Bits per byte"]
        lines += ["", table(header, rows, words=2)]
    return "\n".join(lines)


def losses_sections(results: StudyResults) -> str:
    """For each domain, the losses of every plan and their differences."""
    parts = []
    header = ["Plan", "Removed", "Unpruned", *(escaped(capital(variant_label(v))) for v in results.variants)]
    header.append("None minus unpruned")
    header += [escaped(capital(f"{variant_label(one)} minus {variant_label(two)}")) for one, two in results.steps]
    for domain in results.domains:
        unpruned = results.loss(UNPRUNED, domain)
        rows = []
        for plan in results.plans:
            losses = [results.loss(f"{plan.name}/{variant}", domain) for variant in results.variants]
            gaps = [results.between(plan, one, two, domain) for one, two in results.steps]
            if any(losses):
                cells = [f"{loss.loss:.3f}" if loss else ABSENT for loss in (unpruned, *losses)]
                cells += [_bold(gap) for gap in (results.above_unpruned(plan, NONE, domain), *gaps)]
                rows.append([escaped(plan.name), escaped(plan.removed), *cells])
        if rows:
            title = f"## Loss on {escaped(domain)} ({results.role(domain)}), nats per token"
            parts.append(f"{title}\n\n{table(header, rows, words=2)}")
    return "\n\n".join(parts)


def perplexity_section(results: StudyResults) -> str:
    """Perplexity and bits per byte of every variant."""
    header = ["Plan", "Variant"]
    for domain in results.domains:
        header += [f"{escaped(domain)}: perplexity", f"{escaped(domain)}: bits per byte"]
    rows = []
    names = [(UNPRUNED, UNPRUNED, ABSENT)]
    names += [(f"{plan.name}/{v}", v, escaped(plan.label)) for plan in results.plans for v in results.variants]
    for key, variant, label in names:
        losses = [results.loss(key, domain) for domain in results.domains]
        if any(losses):
            cells = []
            for loss in losses:
                cells += [f"{loss.perplexity:,.2f}", f"{loss.bits_per_byte:.3f}"] if loss else [ABSENT, ABSENT]
            rows.append([label, escaped(variant_label(variant)), *cells])
    return f"## Perplexity and bits per byte\n\n{table(header, rows, words=2)}" if rows else ""


def recovered_section(results: StudyResults) -> str:
    """The share of the damage that came back."""
    pairs = [(domain, variant) for domain in results.domains for variant in results.variants if variant != NONE]
    header = ["Plan", *(f"{escaped(domain)}: {escaped(variant_label(variant))}" for domain, variant in pairs)]
    rows = []
    for plan in results.plans:
        shares = [results.recovered(plan, variant, domain) for domain, variant in pairs]
        rows.append([escaped(plan.label), *map(_share, shares)])
    if not pairs or not rows:
        return ""
    return f"## Share of the damage recovered\n\n{table(header, rows)}"


def training_section(results: StudyResults) -> str:
    """Every training run: its budget, and what it changed."""
    header = ["Plan", "Replacement", "Steps", "Tokens", "Trainable parameters", "Learning rate"]
    header += [f"{escaped(capital(curve_label(results, text)))}: change" for text in ("train", *results.domains)]
    header += ["Overfitting", *(f"{escaped(domain)}: forgetting" for domain in results.domains)]
    rows, notes = [], []
    for plan in results.plans:
        run = results.training.get(plan.name)
        if not run:
            continue
        options = ", ".join(f"{name} {value}" for name, value in run.get("options", {}).items())
        replacement = variant_label(run["replacement"]) + (f" ({options})" if options else "")
        numbers = [f"{run.get(name, 0):,}" for name in ("steps", "tokens", "trainable_parameters")]
        row = [escaped(plan.label), escaped(replacement), *numbers, f"{run.get('learning_rate', 0):g}"]
        rows.append([*row, *_curve_cells(results, run.get("curve", []))])
        if run.get("converged") is False:
            notes.append(f"- {escaped(plan.label)}: {escaped(not_converged(results, plan))}.")
    if not rows:
        return ""
    text = (
        "Losses on tune text and on training documents scored again, in nats per token. Changes are since the start of "
        "training, which is the emulated update; on a domain they are its regression."
    )
    return "\n\n".join(["## Training", text, table(header, rows, words=2), "\n".join(notes)])


def influence_section(results: StudyResults) -> str:
    """The first sites of each order, by metric and kind."""
    scored = results.influence
    if scored is None:
        return ""
    kinds = [kind for kind in PLURALS if any(site.kind == kind for site in scored.sites)]
    rows = []
    for metric in scored.metrics:
        orders = [", ".join(str(site.index) for site in scored.order(metric, [kind])[:FIRST]) for kind in kinds]
        rows.append([escaped(metric), *orders])
    text = f"The first {FIRST} sites to go, by block number, lowest influence first. Metrics order sites differently."
    header = ["Metric", *(capital(PLURALS[kind]) for kind in kinds)]
    return f"## Influence\n\n{text}\n\n{table(header, rows, words=len(header))}"


def origin_section(results: StudyResults) -> str:
    """The command, the versions and the times."""
    study = results.study
    parts = [how] if (how := origin_text(study)) else []
    if study.get("seconds"):
        times = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in study["seconds"].items())
        parts.append(f"Time: {escaped(times)}.")
    return "\n\n".join(parts)


def _bold(gap: Interval | None) -> str:
    """A difference with its interval, bold where it excludes 0."""
    text = interval_text(gap)
    return f"**{text}**" if gap and gap.excludes_zero else text


def _share(share: Interval | None) -> str:
    """A share of the damage in percent with its interval."""
    if share is None:
        return ABSENT
    text = f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"
    return f"**{text}**" if share.excludes_zero else text


def _curve_cells(results: StudyResults, curve: list[dict[str, float]]) -> list[str]:
    """What a training run changed: by text since the start, overfitting, and forgetting by domain."""
    texts = ("train", *results.domains)
    points = {text: [point[text] for point in curve if text in point] for text in texts}
    change = {text: values[-1] - values[0] for text, values in points.items() if values}
    near = results.domains[0] if results.domains else ""
    cells = [signed(change[text]) if text in change else ABSENT for text in texts]
    cells.append(signed(change[near] - change["train"]) if {near, "train"} <= change.keys() else ABSENT)
    lost = [points[d][-1] - min(points[d]) if points[d] else None for d in results.domains]
    return [*cells, *(ABSENT if value is None else f"{value:.3f}" for value in lost)]
