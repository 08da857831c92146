"""The RPCs of the gateway: who may call, messages, streams that can be resumed, accounting."""
