"""The HTTP server: OpenAI's API over AsyncEngine, on aiohttp."""
