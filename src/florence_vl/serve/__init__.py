"""Chat in the terminal, an OpenAI-compatible server, a web page, vLLM."""
