# archive.py: hears of every new email, and answers queries for them
from emails import EmailQuery, NewEmail

import evbus

emails: list[NewEmail] = []

with evbus.connect() as client:

    @client.on("email.new")
    def store(email: NewEmail) -> None:
        emails.append(email)
        print(f"stored {email.subject!r}, sent at {email.send_time:%H:%M} UTC", flush=True)

    @client.on_query("email.find")
    def find(query: EmailQuery) -> list[NewEmail]:
        return [email for email in emails if query.subject in email.subject]

    input("The archive is open; Enter closes it.\n")
