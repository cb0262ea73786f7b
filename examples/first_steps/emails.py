# emails.py: what the programs say to each other
from dataclasses import dataclass
from datetime import datetime


@dataclass
class NewEmail:
    subject: str
    content: str
    send_time: datetime


@dataclass
class EmailQuery:
    subject: str
