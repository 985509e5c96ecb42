"""Notebook 16: half a page from a record, in the order in which a reader doubts."""


def half_page(record) -> str:
    """Markdown. record: the fields of exercise 16.5; one that is missing shows as a gap."""
    r = record
    losses = ", ".join(f"{name} {loss:.2f}" for name, loss in r.get("losses", {}).items())
    parts = {
        "Claim": r.get("claim"),
        "Measured": losses and f"mean loss in nats a byte at k = {r['k']}: {losses}.",
        "Control": r.get("control") and f"{r['control']}, with the same k on the same windows.",
        "Uncertainty": r.get("interval")
        and "{} loses {:+.2f} nats a byte against the indexer, {:+.2f} to {:+.2f} (two standard errors, paired): {}.".format(
            r["control"], r["difference"], *r["interval"], r["verdict"]
        ),
        "Condition": r.get("condition"),
        "Not shown": r.get("not shown"),
    }
    return "\n\n".join(f"**{name}.** {text or '*(nothing)*'}" for name, text in parts.items())
