# test_archive.py: a test of the archive, on a bus in memory
from datetime import datetime, timezone

from archive import router
from emails import EmailQuery, NewEmail

pytest_plugins = ["evbus.testing"]


def test_a_stored_email_is_found(evbus_memory):
    evbus_memory.client().include(router)
    client = evbus_memory.client()
    lunch = NewEmail("Lunch", "At noon?", datetime.now(timezone.utc))
    client.publish(lunch)
    evbus_memory.wait_idle()
    assert client.query(EmailQuery("Lunch")) == [lunch]
    assert client.query(EmailQuery("Dinner")) == []
