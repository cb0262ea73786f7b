# mail.py: sends an email, or finds the ones with a word in their subject
import sys
from datetime import datetime, timezone

from emails import EmailQuery, NewEmail

import evbus

with evbus.connect() as client:
    match sys.argv[1:]:
        case ["send", subject, content]:
            receipt = client.publish(NewEmail(subject, content, datetime.now(timezone.utc)), confirm=True)
            print(f"sent to {receipt.receivers} subscriber(s)")
        case ["find", word]:
            for email in client.query(EmailQuery(word)):
                print(f"{email.subject}: {email.content}")
        case _:
            print("usage: mail.py send SUBJECT CONTENT, or mail.py find WORD")
