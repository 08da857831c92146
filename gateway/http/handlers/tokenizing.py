"""The handlers of the tokenizer's calls, in vLLM's shapes."""

from gateway.http.exchange import Exchange
from gateway.http.openai.tokenizing import (
    DetokenizeBody,
    TokenizeBody,
    detokenize_request,
    tokenization,
    tokenize_request,
)
from gateway.request.tokenization import detokenize, tokenize
from gateway.rpc.pipeline import Pipeline


class Tokenizing:
    """Answers what needs the tokenizer alone."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    async def tokenize(self, exchange: Exchange, body: TokenizeBody) -> None:
        request, naming = tokenize_request(body)
        with naming.applied():
            tools = self._pipeline.tokenizer_tools(request.model, exchange)
            response = await tokenize(request, tools)
        answer = tokenization(
            response,
            tools.window.length,
            tools.vocabulary.control_ids,
            token_strs=bool(body.return_token_strs),
        )
        await exchange.answer(answer)

    async def detokenize(self, exchange: Exchange, body: DetokenizeBody) -> None:
        request, naming = detokenize_request(body)
        with naming.applied():
            tools = self._pipeline.tokenizer_tools(request.model, exchange)
            response = await detokenize(request, tools)
        await exchange.answer({"prompt": response.texts[0].text})

    async def info(self, exchange: Exchange) -> None:
        """Tells what the served files say of the tokenizer, under the names of Hugging Face's."""
        tools = self._pipeline.tokenizer_tools("", exchange)
        vocabulary = tools.vocabulary
        names = {token_id: name for name, token_id in vocabulary.control_ids.items()}
        answer = {
            # The classes of transformers that read such a vocabulary.
            "tokenizer_class": "PreTrainedTokenizerFast"
            if vocabulary.byte_level
            else "LlamaTokenizer",
            "add_bos_token": vocabulary.bos_id is not None,
            "bos_token": None if vocabulary.bos_id is None else names.get(vocabulary.bos_id),
            "eos_token": names.get(vocabulary.eos_ids[0]),
            "vocab_size": len(vocabulary),
            "model_max_length": tools.window.length,
            "chat_template": vocabulary.chat_template or None,
        }
        await exchange.answer(answer)
