// Browsers refuse workers to pages that are read from a folder. There the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<script>self.postMessage = data => frameElement.answer(data)<" + "/script><script src=\"" + address + "\"><" + "/script>";
      frame.answer = data => this.dispatchEvent(new MessageEvent("message", { data }));
      this.ready = new Promise(resolve => frame.addEventListener("load", () => resolve(frame.contentWindow), { once: true }));
      const add = () => document.body.appendChild(frame);
      document.body ? add() : addEventListener("DOMContentLoaded", add, { once: true });
    }
    postMessage(data) {
      this.ready.then(frame => frame.dispatchEvent(new frame.MessageEvent("message", { data })));
    }
    terminate() {}
  };
}
