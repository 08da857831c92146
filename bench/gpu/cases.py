"""What one loaded engine is asked: single streams, batches, prompts, and the first token.

Each case yields rows with the measured times and their share of the bound that applies. The first
pass of each is not counted: it pays for what later ones find ready.
"""

from collections.abc import Iterator

from bench.engine.driver import Driver, Passage
from bench.engine.roofline import Card, Network, Work
from bench.gpu.sizes import Sizes
from bench.report import Row, Value
from bench.summary import summarize


def one_stream(driver: Driver, network: Network, card: Card, sizes: Sizes) -> Iterator[Row]:
    """Decode of one sequence."""
    passages = _passages(driver, 1, sizes.short_prompt, sizes.answer, sizes.rounds)
    yield Row(
        "one stream",
        {**_settings(network), "prompt_tokens": sizes.short_prompt, "answer_tokens": sizes.answer},
        decode_values(passages, network, card),
    )


def decode_values(passages: list[Passage], network: Network, card: Card) -> dict[str, Value]:
    """Rates and shares of single streams, from the first token to the last."""
    bandwidths = []
    for passage in passages:
        steps = passage.all_decode()
        read = sum(network.bytes(work) for work in passage.works()[steps])
        bandwidths.append(read / sum(passage.seconds()[steps]))
    rate, bandwidth = summarize(decode_rates(passages)), summarize(bandwidths).median
    return {
        "tokens_per_s": rate.median,
        "tokens_per_s_low": rate.low,
        "tokens_per_s_high": rate.high,
        "ms_per_token": 1e3 / rate.median,
        "share_of_copy_bandwidth": bandwidth / card.copy,
        "share_of_read_bandwidth": bandwidth / card.read,
    }


def decode_rates(passages: list[Passage]) -> list[float]:
    """Tokens per second of each, all its streams together, while all of them decode."""
    rates = []
    for passage in passages:
        steps = passage.all_decode()
        tokens = sum(work.tokens for work in passage.works()[steps])
        rates.append(tokens / sum(passage.seconds()[steps]))
    return rates


def batch(driver: Driver, network: Network, card: Card, sizes: Sizes) -> Iterator[Row]:
    """Many equal requests that arrive at once, from then to the last token."""
    passages = _passages(driver, sizes.streams, sizes.prompt, sizes.answer, sizes.rounds)
    overall, shares, decode_shares = [], [], []
    for passage in passages:
        steps, seconds = passage.all_decode(), passage.seconds()
        least = [network.least_seconds(w, card) if w.tokens else 0.0 for w in passage.works()]
        overall.append(sizes.streams * sizes.answer / sum(seconds))
        shares.append(sum(least) / sum(seconds))
        decode_shares.append(sum(least[steps]) / sum(seconds[steps]))
    rate = summarize(overall)
    yield Row(
        "batch",
        {
            **_settings(network),
            "streams": sizes.streams,
            "prompt_tokens": sizes.prompt,
            "answer_tokens": sizes.answer,
        },
        {
            "tokens_per_s": rate.median,
            "tokens_per_s_low": rate.low,
            "tokens_per_s_high": rate.high,
            "share_of_limit": summarize(shares).median,
            "decode_tokens_per_s": summarize(decode_rates(passages)).median,
            "decode_share_of_limit": summarize(decode_shares).median,
        },
    )


def prefill(driver: Driver, network: Network, card: Card, sizes: Sizes) -> Iterator[Row]:
    """One long prompt up to its first token, in one step."""
    seconds = first_token_seconds(driver, sizes.long_prompt, sizes.rounds)
    work = Work.prompt(sizes.long_prompt)
    taken = summarize(seconds)
    yield Row(
        "prefill",
        {**_settings(network), "prompt_tokens": sizes.long_prompt},
        {
            "tokens_per_s": sizes.long_prompt / taken.median,
            "ms": 1e3 * taken.median,
            "ms_low": 1e3 * taken.low,
            "ms_high": 1e3 * taken.high,
            "share_of_matrix_rate": network.computing_seconds(work, card) / taken.median,
        },
    )


def first_token(driver: Driver, network: Network, card: Card, sizes: Sizes) -> Iterator[Row]:
    """The wait for the first token on an idle engine."""
    taken = summarize(first_token_seconds(driver, sizes.prompt, sizes.rounds))
    least = network.least_seconds(Work.prompt(sizes.prompt), card)
    yield Row(
        "first token",
        {**_settings(network), "prompt_tokens": sizes.prompt},
        {
            "ms": 1e3 * taken.median,
            "ms_low": 1e3 * taken.low,
            "ms_high": 1e3 * taken.high,
            "limit_ms": 1e3 * least,
            "over_limit": taken.median / least,
        },
    )


def first_token_seconds(driver: Driver, length: int, rounds: int) -> list[float]:
    """From the arrival of a prompt to its first token, on an engine that has nothing else to do."""
    passages = _passages(driver, 1, length, 1, rounds)
    return [passage.arrivals()[0][0] - passage.started for passage in passages]


def _passages(driver: Driver, streams: int, prompt: int, answer: int, rounds: int) -> list[Passage]:
    passages = [
        driver.answer(driver.prompts([prompt] * streams), answer) for _ in range(rounds + 1)
    ]
    return passages[1:]


def _settings(network: Network) -> dict[str, Value]:
    return {"shape": network.shape.name, "weights": network.precision}
