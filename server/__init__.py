"""The HTTP service: FastAPI on `/v1` in OpenAI's shapes, event streams, and the dashboard at `/`."""
