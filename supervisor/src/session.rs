//! Worker sessions: the newest that said Hello is the active one, and each older one is told so once and gets `Superseded` from then on.

use diarch_ipc::channel::Channel;
use diarch_ipc::frame::{ServerFrame, encode};
use diarch_ipc::operation::Event;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};
use std::time::Duration;

/// A peer that takes no event for so long is not there.
const SEND_PATIENCE: Duration = Duration::from_secs(5);
/// Events that wait for a peer that does not read; the oldest go first, since the inventory tells the same.
const MAX_WAITING: usize = 8192;

/// Who may ask now.
#[derive(Default)]
pub struct Sessions {
    count: Cell<u64>,
    active: RefCell<Option<Active>>,
}

struct Active {
    number: u64,
    outbox: Rc<Outbox>,
}

/// Events on their way to one peer, in order.
struct Outbox {
    channel: Weak<Channel>,
    waiting: RefCell<VecDeque<Event>>,
    sending: Cell<bool>,
}

impl Sessions {
    /// Makes a new session the active one; the one before is told.
    pub fn begin(&self, channel: &Rc<Channel>) -> u64 {
        let number = self.count.get() + 1;
        self.count.set(number);
        let outbox = Rc::new(Outbox { channel: Rc::downgrade(channel), waiting: RefCell::default(), sending: Cell::new(false) });
        let before = self.active.borrow_mut().replace(Active { number, outbox });
        if let Some(before) = before {
            before.outbox.push(Event::SessionSuperseded {});
        }
        number
    }

    pub fn is_active(&self, number: u64) -> bool {
        self.active.borrow().as_ref().is_some_and(|active| active.number == number)
    }

    /// Whether somebody listens.
    pub fn is_there(&self) -> bool {
        self.active.borrow().as_ref().is_some_and(|active| active.outbox.channel.strong_count() > 0)
    }

    /// Tells the active session, if there is one. Nobody waits for it to listen.
    pub fn tell(&self, event: Event) {
        let outbox = self.active.borrow().as_ref().map(|active| Rc::clone(&active.outbox));
        if let Some(outbox) = outbox {
            outbox.push(event);
        }
    }
}

impl Outbox {
    fn push(self: Rc<Self>, event: Event) {
        {
            let mut waiting = self.waiting.borrow_mut();
            if waiting.len() >= MAX_WAITING {
                waiting.pop_front();
            }
            waiting.push_back(event);
        }
        if !self.sending.replace(true) {
            tokio::task::spawn_local(async move {
                self.drain().await;
                self.sending.set(false);
            });
        }
    }

    async fn drain(&self) {
        let mut bytes = Vec::new();
        loop {
            let Some(event) = self.waiting.borrow_mut().pop_front() else { return };
            let Some(channel) = self.channel.upgrade() else { return };
            if encode(&ServerFrame::Event(event), &mut bytes).is_err() {
                continue;
            }
            if !matches!(tokio::time::timeout(SEND_PATIENCE, channel.send_encoded(&bytes, &[])).await, Ok(Ok(()))) {
                return;
            }
        }
    }
}
