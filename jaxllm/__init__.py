"""jaxllm."""
