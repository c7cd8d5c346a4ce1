"""Tools for the training prompts: natural ones, ones composed from a verb and a noun, and ones that mean nothing."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import world
from sample import made_up_word, name, place

_WORDS = world.THINGS + world.FOODS + world.JOBS + list(world.ANIMALS) + world.COLOUR_WORDS + world.COMMON * 2


def word(r: Random) -> str:
    """Choose a short common or made-up word."""
    return made_up_word(r) if r.random() < 0.4 else r.choice(_WORDS)


def phrase(r: Random) -> str:
    """Choose two to five words, sometimes a title."""
    text = " ".join(word(r) for _ in range(r.randint(2, 5)))
    return text.title() if r.random() < 0.2 else text


def message(r: Random) -> str:
    """Choose a short sentence without its final mark."""
    return r.choice([
        f"the {word(r)} is {r.choice(['late', 'ready', 'here', 'broken', 'red'])}", f"see you at {clock(r)}", f"I will be {r.randint(2, 59)} minutes late",
        f"happy birthday {name(r)}", f"bring the {word(r)}", f"meet me in {place(r)}", "good luck", "I'm on my way", "don't forget",
        f"I'm at the {word(r)}", phrase(r), phrase(r), f"we need {r.randint(2, 99)} {word(r)}s",
    ])  # fmt: skip


def clock(r: Random) -> str:
    """Choose a time of day."""
    return r.choice(
        [
            f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}",
            f"{r.randint(1, 12)}:{r.randint(0, 59):02d}",
            f"{r.randint(1, 12)} {r.choice(['am', 'pm'])}",
        ]
    )


def date(r: Random) -> str:
    """Choose a date or a day."""
    iso = f"{r.randint(2020, 2031)}-{r.randint(1, 12):02d}-{r.randint(1, 28):02d}"
    return r.choice(
        [iso, iso, r.choice(world.DAYS), f"{r.choice(world.MONTHS)} {r.randint(1, 28)}", "today", "tomorrow"]
    )


def identifier(r: Random) -> str:
    """An order number, a code."""
    letters = "".join(r.choice(string.ascii_uppercase) for _ in range(r.randint(1, 3)))
    return letters + r.choice(["", "-"]) + str(r.randint(1, 99999))


def email(r: Random) -> str:
    """A mail address."""
    return f"{name(r).lower()}@{made_up_word(r)}.{r.choice(['com', 'org', 'net'])}"


def path(r: Random) -> str:
    """A file name or a path."""
    file = f"{word(r)}.{r.choice(['txt', 'pdf', 'csv', 'md', 'py', 'png'])}"
    return r.choice([file, f"/{word(r)}/{word(r)}", f"/{word(r)}/{file}", f"https://{made_up_word(r)}.com"])


def expression(r: Random) -> str:
    """A sum to calculate."""
    return f"{r.randint(0, 999)} {r.choice('+-*/')} {r.randint(0, 999)}"


def integer(r: Random) -> int:
    """A whole number of one to four digits."""
    return r.randint(0, 10 ** r.randint(1, 4) - 1)


def number(r: Random) -> float | int:
    """A whole or decimal number."""
    return integer(r) if r.random() < 0.5 else round(r.randint(1, 999) + r.randint(1, 99) / 100, r.choice((1, 2)))


@dataclass(frozen=True)
class Kind:
    """A kind of parameter: what it may be called, its JSON type, its values, and how a request brings it in."""

    names: str
    type: str
    value: Callable[[Random], Any]
    links: str


KINDS: dict[str, Kind] = {
    "city": Kind("city location place town", "string", place, "in"),
    "origin": Kind("origin source from_city start departure", "string", place, "from"),
    "destination": Kind("destination target to_city end arrival", "string", place, "to"),
    "person": Kind("name person user customer guest contact", "string", name, "for"),
    "recipient": Kind("recipient to receiver", "string", name, "to"),
    "date": Kind("date day when", "string", date, "on"),
    "time": Kind("time at hour start_time", "string", clock, "at"),
    "title": Kind("title label name", "string", phrase, "called|named|titled"),
    "topic": Kind("topic subject about", "string", word, "about"),
    "text": Kind("text message body content", "string", message, "saying|that says"),
    "count": Kind("count quantity number amount people", "integer", integer, "for"),
    "minutes": Kind("minutes duration length", "integer", integer, "lasting"),
    "price": Kind("price amount cost max_price", "number", number, "costing|under"),
    "percent": Kind("level percent value", "integer", lambda r: r.randint(0, 100), "at|to"),
    "colour": Kind("color colour", "string", lambda r: r.choice(world.COLOUR_WORDS), "in"),
    "room": Kind(
        "room area",
        "string",
        lambda r: r.choice("kitchen bedroom office garden hall bathroom garage".split()),
        "in the",
    ),
    "id": Kind("id order_id code ticket number_plate", "string", identifier, "with id|with code|number"),
    "email": Kind("email address mail", "string", email, "to|for"),
    "path": Kind("path file filename folder url", "string", path, "from|at|in"),
    "query": Kind("query keyword term search", "string", word, "matching|for"),
    "language": Kind(
        "language lang", "string", lambda r: r.choice("English French German Spanish Italian Japanese".split()), "in"
    ),
    "unit": Kind("unit units", "string", lambda r: r.choice("celsius fahrenheit metric imperial kelvin".split()), "in"),
    "size": Kind("size", "string", lambda r: r.choice("small medium large".split()), "in size"),
    "flag": Kind("urgent private silent fast public", "boolean", lambda r: r.random() < 0.5, ""),
}
MADE_UP_KINDS = [Kind("", "string", word, ""), Kind("", "string", phrase, ""), Kind("", "string", name, ""), Kind("", "integer", integer, ""),
                 Kind("", "number", number, ""), Kind("", "string", identifier, ""), Kind("", "string", place, ""), Kind("", "boolean", lambda r: r.random() < 0.5, "")]  # fmt: skip

VERBS = (
    "book order find search create delete open close play start stop show check schedule cancel update add remove buy sell rent reserve "
    "print scan move copy rename share upload download call invite assign measure count track lock unlock turn paint clean cook fetch list "
    "get set send make log sort mix pack ship repair charge pay rate review plan block test build run load save"
).split()
NOUNS = (
    "flight hotel table taxi ticket room car train song movie meeting event reminder alarm note task file folder document report invoice order "
    "pizza parcel package letter user account photo video light lamp heater door window robot sensor timer playlist recipe product stock price "
    "course lesson game match team player review message channel server job backup printer camera drone boat bike garden plant library book map "
    "route bus seat lunch dinner coffee gift card loan tax bill payment"
).split()

# Natural tools: name, description, {parameter: kind}, requests. The fields of a request are the arguments of its call.
NATURAL: list[tuple[str, str, dict[str, str], list[str]]] = [
    ("get_weather", "Get the weather in a city.", {"city": "city", "unit": "unit"}, [
        "What is the weather in {city}?", "What's the weather like in {city}?", "How is the weather in {city}?", "Weather in {city}?", "Is it raining in {city}?",
        "What is the weather in {city} in {unit}?", "How warm is it in {city}, in {unit}?", "Tell me the weather for {city} in {unit}."]),
    ("get_forecast", "Get the weather forecast for a day.", {"city": "city", "date": "date"}, [
        "What is the forecast for {city} on {date}?", "Give me the forecast for {city} on {date}.", "Forecast for {city} on {date}"]),
    ("calculate", "Evaluate an arithmetic expression.", {"expression": "expression"}, [
        "What is {expression}?", "Compute {expression}.", "Calculate {expression}.", "Use the calculator for {expression}.", "How much is {expression}?"]),
    ("set_alarm", "Set an alarm.", {"time": "time", "label": "title"}, [
        "Wake me at {time}.", "Wake me up at {time}.", "Set an alarm for {time}.", "Set an alarm at {time} called {label}.", "Wake me at {time} for {label}."]),
    ("set_timer", "Start a timer.", {"minutes": "minutes"}, [
        "Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes.", "Timer for {minutes} minutes, please."]),
    ("send_message", "Send a message to a person.", {"to": "recipient", "text": "text"}, [
        "Tell {to} that {text}.", "Send {to} the message: {text}", "Send a message to {to}: {text}", "Text {to}: {text}", "Message {to} saying {text}."]),
    ("send_email", "Send an email.", {"to": "email", "subject": "title", "body": "text"}, [
        "Send an email to {to} with subject {subject} and body {body}.", "Email {to} about {subject}: {body}", "Write an email to {to} with the subject {subject}: {body}"]),
    ("convert_currency", "Convert an amount of money.", {"amount": "price", "from": "currency", "to": "currency"}, [
        "How much is {amount} {from} in {to}?", "Convert {amount} {from} to {to}.", "What is {amount} {from} in {to}?", "Change {amount} {from} into {to}."]),
    ("search_files", "Search files in a folder.", {"query": "query", "folder": "path"}, [
        "Find files about {query} in {folder}.", "Search {folder} for {query}.", "Search for {query} in {folder}."]),
    ("search_web", "Search the web.", {"query": "words"}, [
        "Search the web for {query}.", "Look up {query} online.", "Google {query}", "Search for {query}."]),
    ("read_file", "Read a file.", {"path": "path"}, ["Read {path}.", "Show me {path}.", "Open the file {path}.", "What is in {path}?"]),
    ("get_time", "Get the current time in a city.", {"city": "city"}, [
        "What time is it in {city}?", "Tell me the time in {city}.", "What's the time in {city}?", "Current time in {city}?"]),
    ("play_music", "Play a song.", {"title": "title", "artist": "person"}, [
        "Play {title} by {artist}.", "Play the song {title}.", "Put on {title} by {artist}.", "I want to hear {title}."]),
    ("translate", "Translate a text.", {"text": "words", "language": "language"}, [
        "Translate {text} to {language}.", "How do you say {text} in {language}?", "Translate {text} into {language}."]),
    ("get_stock_price", "Get the price of a stock.", {"symbol": "symbol"}, [
        "What is the price of {symbol}?", "How is {symbol} doing?", "Stock price of {symbol}?", "What is the stock price of {symbol}?"]),
    ("book_flight", "Book a flight.", {"origin": "origin", "destination": "destination", "date": "date"}, [
        "Book a flight from {origin} to {destination} on {date}.", "I need a flight from {origin} to {destination} on {date}.",
        "Fly me from {origin} to {destination} on {date}.", "Book me a flight to {destination} from {origin} on {date}."]),
    ("create_event", "Create a calendar event.", {"title": "title", "date": "date", "time": "time"}, [
        "Add {title} to my calendar on {date} at {time}.", "Schedule {title} on {date} at {time}.", "Create an event called {title} on {date}."]),
    ("turn_on_light", "Turn on the light in a room.", {"room": "room"}, [
        "Turn on the light in the {room}.", "Switch on the {room} light.", "Lights on in the {room}.", "Turn on the {room} light."]),
    ("set_temperature", "Set the temperature of a room.", {"room": "room", "degrees": "number"}, [
        "Set the {room} to {degrees} degrees.", "Make the {room} {degrees} degrees.", "Set the temperature in the {room} to {degrees}."]),
    ("roll_dice", "Roll dice.", {"sides": "integer", "count": "integer"}, [
        "Roll a dice with {sides} sides.", "Roll {count} dice with {sides} sides.", "Throw {count} dice with {sides} sides."]),
    ("add_to_cart", "Add a product to the cart.", {"product": "words", "quantity": "integer"}, [
        "Add {quantity} {product} to my cart.", "Put {quantity} {product} in the cart.", "Add {product} to the cart."]),
    ("get_distance", "Get the distance between two cities.", {"origin": "origin", "destination": "destination"}, [
        "How far is it from {origin} to {destination}?", "What is the distance from {origin} to {destination}?", "Distance between {origin} and {destination}?"]),
    ("get_order", "Look up an order.", {"order_id": "id"}, ["Where is my order {order_id}?", "What is the status of order {order_id}?", "Track order {order_id}."]),
    ("define_word", "Look up a word in the dictionary.", {"word": "query"}, ["What does {word} mean?", "Define the word {word}.", "Look up the word {word}."]),
    ("find_restaurant", "Find a restaurant.", {"city": "city", "cuisine": "cuisine"}, [
        "Find a {cuisine} restaurant in {city}.", "Where can I eat {cuisine} food in {city}?", "I want {cuisine} food in {city}."]),
]  # fmt: skip
KINDS |= {
    "expression": Kind("expression", "string", expression, ""),
    "currency": Kind(
        "currency",
        "string",
        lambda r: r.choice("EUR USD GBP JPY CHF SEK INR BRL CAD AUD euros dollars pounds yen".split()),
        "",
    ),
    "words": Kind("words", "string", lambda r: word(r) if r.random() < 0.4 else phrase(r), ""),
    "symbol": Kind(
        "symbol", "string", lambda r: "".join(r.choice(string.ascii_uppercase) for _ in range(r.randint(2, 4))), ""
    ),
    "number": Kind("number", "number", number, ""),
    "integer": Kind("integer", "integer", integer, ""),
    "cuisine": Kind(
        "cuisine", "string", lambda r: r.choice("Italian Thai Indian French Greek Mexican Chinese Turkish".split()), ""
    ),
}
