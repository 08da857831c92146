"""The shapes of requests and answers, OpenAI's and those beside them: from JSON to messages, and
back.
"""
