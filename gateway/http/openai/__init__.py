"""The shapes of OpenAI's API: requests from JSON to messages, answers from messages to JSON."""
