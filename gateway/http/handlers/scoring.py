"""The handler of Score."""

from gateway.http.exchange import Exchange
from gateway.http.openai.scoring import ScoreBody, score_answer, score_request
from gateway.rpc.pipeline import Pipeline
from gateway.rpc.unary import score_response


class Scoring:
    """Tells how probable candidates are."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    async def score(self, exchange: Exchange, body: ScoreBody) -> None:
        request, naming = score_request(body)
        del body  # can have megabytes, as the request, and is not needed while it is scored
        with naming.applied():
            events = self._pipeline.run(request, exchange)
            del request
            response = await score_response(events)
        await exchange.answer(await score_answer(response))
