# mail.py: sends an email, or finds the ones with a word in their subject
import sys
from datetime import datetime, timezone

from emails import EmailQuery, NewEmail

import evbus

with evbus.connect() as client:
    match sys.argv[1:]:
        case ["send", subject, content]:
            email = NewEmail(subject, content, datetime.now(timezone.utc))
            receipt = client.publish("email.new", email, confirm=True)
            print(f"sent to {receipt.receivers} subscriber(s)")
        case ["find", word]:
            found = client.query("email.find", EmailQuery(word), list[NewEmail])
            for email in found:
                print(f"{email.subject}: {email.content}")
        case _:
            print("usage: mail.py send SUBJECT CONTENT, or mail.py find WORD")
