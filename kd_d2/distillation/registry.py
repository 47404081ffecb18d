"""Registry of helpers by the class of what they serve."""

from typing import Any

from detectron2.utils.registry import Registry

__all__ = ["FamilyRegistry"]


class FamilyRegistry(Registry):
    """Classes by the name of the class they serve; an object uses that of its nearest base."""

    def register_for(self, served: type):
        """Decorator: the class below serves ``served`` and its subclasses."""

        def register(cls: type) -> type:
            self._do_register(served.__name__, cls)
            return cls

        return register

    def find(self, served: Any) -> type:
        """Return the class that serves the object ``served``.

        Raises:
            KeyError: neither its class nor a base class is served; the message lists the known.
        """
        for cls in type(served).__mro__:
            if cls.__name__ in self:
                return self.get(cls.__name__)
        raise KeyError(", ".join(sorted(name for name, _ in self)))
