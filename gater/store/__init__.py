"""The embedded event store: an ExESDB gateway worker's answers from SQLite files, for one node that stands alone."""

from gater.store.embedded import EmbeddedStores
from gater.store.engine import StoreOptions

__all__ = ["EmbeddedStores", "StoreOptions"]
