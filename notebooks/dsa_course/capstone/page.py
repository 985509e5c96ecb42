"""Notebook 16: half a page from a record, in the order in which a reader doubts."""

GAP = "*(nothing)*"


def half_page(record) -> str:
    """Markdown. record: the fields of exercise 16.5; one that is missing shows as a gap."""
    losses = ", ".join(f"{name} {loss:.2f}" for name, loss in record.get("losses", {}).items())
    if losses:
        losses = f"mean loss, nats a byte, at k = {record['k']}: {losses}."
    sure = GAP
    if "interval" in record:
        low, high = record["interval"]
        sure = (
            f"{record['control']} loses {record['difference']:+.2f} nats a byte against the indexer, {low:+.2f} to "
            f"{high:+.2f} (two standard errors, paired): {record['verdict']}."
        )
    parts = {
        "Claim": record.get("claim", GAP),
        "Measured": losses or GAP,
        "Control": f"{record['control']}, with the same k on the same windows." if "control" in record else GAP,
        "Uncertainty": sure,
        "Condition": record.get("condition", GAP),
        "Not shown": record.get("not shown", GAP),
    }
    return "\n\n".join(f"**{name}.** {text}" for name, text in parts.items())
