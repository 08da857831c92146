"""The RPCs of the gateway: access, messages, streams that can be resumed, accounting."""
