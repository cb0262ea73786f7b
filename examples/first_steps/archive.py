# archive.py: a worker that hears of every new email, and answers queries for them
from emails import EmailQuery, NewEmail

import evbus

router = evbus.EventRouter()
emails: list[NewEmail] = []


@router.on(NewEmail)
def store(email: NewEmail) -> None:
    emails.append(email)
    print(f"stored {email.subject!r}, sent at {email.send_time:%H:%M} UTC", flush=True)


@router.on_query(EmailQuery)
def find(query: EmailQuery) -> list[NewEmail]:
    return [email for email in emails if query.word in email.subject]
