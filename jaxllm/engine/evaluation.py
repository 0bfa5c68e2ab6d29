"""What a run measures of its state, on held-out rows."""

from collections.abc import Callable, Iterator

from jaxllm import registry
from jaxllm.consistency import PREFERENCES
from jaxllm.data import examples, loader
from jaxllm.data.examples.contract import MakeBatch
from jaxllm.data.prepare import Prepared
from jaxllm.data.shards import Shards
from jaxllm.engine import references
from jaxllm.engine.hooks import Row
from jaxllm.engine.references import References
from jaxllm.engine.session import Session
from jaxllm.engine.state import TrainState, eval_params
from jaxllm.engine.watchdog import Watchdog
from jaxllm.evals import baseline, metrics, perplexity
from jaxllm.types import Batch


def make(
    session: Session, prepared: Prepared, watchdog: Watchdog, referred: References | None = None
) -> Callable[[TrainState], Row]:
    """evaluate(state) -> the row of a validation. Of tokens it has perplexity, what a guess that reads nothing would get and, as replay_*,
    the held-out part of data.replay_source; of preferences the metrics of their objective. referred: the reference, where that needs one.
    """
    config, shards = session.config, prepared.validation

    def sweep(rows: Shards, make_batch: MakeBatch) -> Iterator[Batch]:
        arranged, sharding = session.plan.arrange(make_batch), session.plan.batch_sharding()
        return watchdog.each(loader.sweep(rows, arranged, session.eval_seqs, sharding, config.eval.max_seqs))

    if config.train.objective in PREFERENCES:
        objective = registry.resolve("objective", config.train.objective)(session.model, config)
        compare = metrics.make_eval(objective, session.model, config, examples.make(config).unit, session.region)
        with_reference = references.joined(referred, "validation", prepared.make_batch(config))
        return lambda state: compare(eval_params(state), sweep(shards, with_reference))

    make_batch = prepared.make_batch(config)
    with_reference = references.joined(referred, "validation", make_batch)
    measure = perplexity.make_eval(session.model, config, session.region, with_reference=referred is not None)

    outcomes = config.model.vocab_size if config.model.head == "lm" else config.model.classes
    guess = baseline.measure(prepared.train, shards, make_batch, outcomes, config.eval.max_seqs)

    replayed, seen = prepared.replay_validation, examples.replayed(config)
    measure_replay = measure if seen is config else perplexity.make_eval(session.model, seen, session.region)

    def evaluate(state: TrainState) -> Row:
        params = eval_params(state)
        row = measure(params, sweep(shards, with_reference), shards.bytes_per_token)
        row |= {"baseline_loss": guess.loss, "baseline_accuracy": guess.accuracy}
        if replayed is None:
            return row
        found = measure_replay(params, sweep(replayed, prepared.make_replay_batch(config)), replayed.bytes_per_token)
        return row | {f"replay_{name}": found[name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")}

    return evaluate
