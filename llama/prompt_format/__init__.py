"""Dialog rules and prompt formats, as pure functions that gateway, services and `Llama` share."""
