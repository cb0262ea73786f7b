# emails.py: what the programs say to each other, and on which subjects
from dataclasses import dataclass
from datetime import datetime

import evbus


@evbus.event("email.new")
@dataclass
class NewEmail:
    subject: str
    content: str
    send_time: datetime


@dataclass
class EmailQuery(evbus.Query[list[NewEmail]], subject="email.find"):
    word: str
