"""The LLM facade, the engine process and the OpenAI HTTP API."""
