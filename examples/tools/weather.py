"""A tool that made-up weather comes from: flash-moe chat --tools examples/tools/weather.py."""


def get_weather(city: str) -> dict:
    """Get the weather in a city.

    Args:
        city: Name of the city.
    """
    return {"temperature": 10 + len(city), "condition": "sunny"}
