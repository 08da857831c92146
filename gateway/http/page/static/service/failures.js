// Failures of requests, in plain words.

const WORDS = {
  400: "The service cannot answer this request.",
  401: "The service needs an API key that it knows.",
  403: "This API key does not have the permission.",
  404: "The service does not have this.",
  408: "The request took too long to arrive.",
  413: "The request, or its answer, is larger than the service allows.",
  429: "The service has as much work as it allows.",
  431: "The request's headers are too large.",
  500: "The service failed.",
  503: "The service cannot answer now.",
};

/** An answer of the service that is an error. */
export class ServiceError extends Error {
  /** `problem` is OpenAI's error object; `retryAfter` has seconds, or is null. */
  constructor(status, problem, retryAfter = null, requestId = null) {
    super(problem?.message ?? "It did not say why.");
    this.status = status;
    this.param = problem?.param ?? null;
    this.retryAfter = retryAfter;
    this.requestId = requestId;
  }
}

/** No connection to the service could be made. */
export class UnreachableError extends Error {}

/** The connection ended before the answer did. */
export class BrokenStreamError extends Error {}

/** The parts of a failure that are shown and kept: `title`, `detail`, `param`, `retryAt`. */
export function described(error) {
  if (error instanceof ServiceError) {
    const { status, message, param, retryAfter, requestId } = error;
    return {
      title: WORDS[status] ?? WORDS[status >= 500 ? 500 : 400],
      detail: requestId && status >= 500 ? `${message} (request ${requestId})` : message,
      status,
      param,
      retryAt: retryAfter === null ? null : Date.now() + 1000 * retryAfter,
    };
  }
  if (error instanceof BrokenStreamError) {
    return { title: "The connection broke before the answer was complete.", detail: "" };
  }
  if (error instanceof UnreachableError) {
    return {
      title: "The service cannot be reached.",
      detail: `Check that it still runs at ${location.origin}.`,
    };
  }
  return { title: "The page failed.", detail: String(error) };
}
