"""Models behind HTTP: any OpenAI-compatible server as policy; vLLM and SGLang as reward models."""
